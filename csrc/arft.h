/* The C ABI of arft_fast.
 *
 * Plain pointers and sizes, row-major and contiguous; no torch, no Python, no state, no allocation that outlives a
 * call. Functions that compute return an arft_status; outputs are unspecified unless it is ARFT_OK. Pointers must not
 * alias, except where it says so. arft_fast/kernels/native.py and native_rows.py are the only callers and mirror this.
 */
#ifndef ARFT_H
#define ARFT_H

#include <stdint.h>

#define ARFT_API __attribute__((visibility("default")))

/* Raised by one whenever a signature or a meaning below changes; native.py refuses a library of another version. */
#define ARFT_ABI_VERSION 2

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  ARFT_OK = 0,
  ARFT_NULL_POINTER = 1,  /* a required pointer is NULL though its array is not empty */
  ARFT_BAD_SIZE = 2,      /* rows or groups < 0, components or vocabulary < 1, or more than the function can take */
  ARFT_BAD_OFFSETS = 3,   /* offsets do not rise from 0 to rows */
  ARFT_BAD_RULE = 4,      /* center, scale or order in no enum, or std_floor negative or not finite */
  ARFT_BAD_EPSILON = 5,   /* epsilon is not a positive finite number */
  ARFT_BAD_DTYPE = 6,     /* a dtype that this function does not take, or a pair of them */
  ARFT_BAD_TOKEN = 7,     /* a token id outside 0 .. vocabulary - 1 */
  ARFT_BAD_TRANSFORM = 8, /* temperature or logit_scale not positive and finite, or softcap negative or not finite */
  ARFT_BAD_OBJECTIVE = 9, /* surrogate, kl or sampler is no member of its enum */
  ARFT_BAD_ISA = 10,      /* the instruction set that was asked for is not in this build or not in this CPU */
  ARFT_CUDA_ERROR = 11,   /* the CUDA runtime refused: see arft_cuda_last_error */
  ARFT_BAD_GATE = 12,     /* a gate is no component */
} arft_status;

ARFT_API int32_t arft_abi_version(void);

/* ---- Group-relative advantages: normalization of rewards within groups, on the CPU ---- */

/* What is subtracted from a value. */
typedef enum {
  ARFT_CENTER_NONE = 0,          /* nothing */
  ARFT_CENTER_MEAN = 1,          /* the mean of its group */
  ARFT_CENTER_LEAVE_ONE_OUT = 2, /* the mean of the others of its group */
} arft_center;

/* What it is then divided by. */
typedef enum {
  ARFT_SCALE_NONE = 0,  /* nothing */
  ARFT_SCALE_GROUP = 1, /* max(std of its group, std_floor) + epsilon */
  ARFT_SCALE_BATCH = 2, /* max(std of all valid values, std_floor) + epsilon */
} arft_scale;

typedef enum { ARFT_SUM_THEN_NORMALIZE = 0, ARFT_NORMALIZE_THEN_SUM = 1 } arft_order;

/* From rewards to advantages; group_advantage_reference.py holds the same in Python. */
typedef struct {
  int32_t center;  /* arft_center */
  int32_t scale;   /* arft_scale */
  int32_t order;   /* arft_order */
  int32_t whiten;  /* 1: divide A by (std of all valid A + epsilon); with ARFT_CENTER_NONE subtract their mean first */
  double std_floor; /* >= 0 */
  double epsilon;   /* > 0 */
} arft_normalization;

/* With v[i][k] = rewards[i][k], 0 where gate_by[k] >= 0 and rewards[i][gate_by[k]] < gate_threshold[k], and N the
 * normalization within a group (center and scale of arft_normalization, std with ddof 1):
 *
 *   r_i = float(sum_k weights[k] v[i][k])
 *   A_i = N(r)_i                                  ARFT_SUM_THEN_NORMALIZE (GRPO, arXiv 2402.03300, section 4.1.2)
 *   A_i = sum_k weights[k] N(v[.][k])_i           ARFT_NORMALIZE_THEN_SUM (GDPO, arXiv 2601.05242)
 *
 * A NaN component counts 0 and is in no mean and std; a row of only NaN is left out of everything. Sums run in double.
 * Values that are all equal have exactly their value as mean, and std 0.
 *
 *   rewards        [rows][components]
 *   weights        [components], or NULL for ones
 *   gate_by        [components], -1 where no component is the gate; or NULL for no gates
 *   gate_threshold [components], read where gate_by is >= 0
 *   offsets        [groups + 1]: group g holds the rows offsets[g] .. offsets[g + 1] - 1
 *   scratch        [rows]        overwritten
 *   advantages     [rows]        out; 0 for rows that are left out
 *   mean, std      [groups]      out, of r; mean NaN without a valid row, std 0 with fewer than two
 *   no_signal      [groups]      out; 1 where every advantage of the group is 0
 */
ARFT_API int32_t arft_group_advantage_f32(const float* rewards, const float* weights, const int64_t* gate_by,
                                          const float* gate_threshold, const int64_t* offsets, int64_t rows,
                                          int64_t components, int64_t groups, const arft_normalization* rule,
                                          double* scratch, float* advantages, float* mean, float* std,
                                          uint8_t* no_signal);

/* ---- Row kernels: log-probs of sampled tokens, the coefficient of an objective, the gradient of the logits ---- */

typedef enum { ARFT_F32 = 0, ARFT_F64 = 1, ARFT_BF16 = 2, ARFT_F16 = 3 } arft_dtype;

/* y = softcap tanh(logit_scale (x + bias) / softcap) / temperature; -inf stays -inf. */
typedef struct {
  double temperature; /* > 0 */
  double softcap;     /* 0: no cap, y = logit_scale (x + bias) / temperature */
  double logit_scale; /* > 0 */
} arft_transform;

typedef enum { ARFT_CLIP = 0, ARFT_CISPO = 1, ARFT_SAPO = 2 } arft_surrogate;
typedef enum { ARFT_K1 = 0, ARFT_K2 = 1, ARFT_K3 = 2 } arft_kl;
typedef enum { ARFT_SAMPLER_NONE = 0, ARFT_SAMPLER_TRUNCATE = 1, ARFT_SAMPLER_MASK = 2 } arft_sampler;

/* How a row's coefficient follows from its log-prob: RowObjective in arft_fast/kernels/rows.py states the formulae. */
typedef struct {
  int32_t surrogate;     /* arft_surrogate */
  int32_t kl;            /* arft_kl */
  int32_t kl_correction; /* 1: the KL estimate is multiplied by the ratio */
  int32_t sampler;       /* arft_sampler */
  double ratio_low, ratio_high, delta, dual_clip;
  double sapo_positive, sapo_negative;
  double beta, entropy_coef;
  double sampler_low, sampler_high;
} arft_row_objective;

/* Rows of raw products x = hidden @ weight.T and what is computed from them. With y = transform(x + bias), logp =
 * log_softmax(y), p = exp(logp), t the token, H the entropy -sum_j p_j logp_j, coefficients g = d loss / d logp_t and
 * e = d loss / d H:
 *
 *   gradient_j = (g (1[j = t] - p_j) - e p_j (logp_j + H)) dy_j / dx_j
 *
 * Three modes, by what is NULL:
 *   score      gradient and objective NULL: writes logprobs and entropy
 *   policy     both given: also decides g with the objective (e = -entropy_coef scale), writes coefficient and gradient
 *   gradients  objective NULL: reads coefficient and entropy_weight (NULL for zeros), writes gradient
 *
 * Arrays [rows] and the bias are float, or double where the logits are. A row with g = 0 and e = 0 gets zeros in
 * `gradient`. The gradient may lie over the logits with the same row starts if its elements are as wide or narrower. */
typedef struct {
  int64_t rows, vocabulary;
  const void* logits;           /* [rows][vocabulary]; unchanged unless the gradient lies over it */
  void* gradient;               /* [rows][vocabulary] out */
  int64_t logits_stride;        /* elements from one row to the next */
  int64_t gradient_stride;      /* elements from one row to the next */
  int32_t logits_dtype;         /* arft_dtype */
  int32_t gradient_dtype;       /* arft_dtype */
  const int64_t* token_ids;     /* [rows] */
  const void* bias;             /* [vocabulary], -inf forbids an id; or NULL */
  const void* advantage;        /* [rows], policy */
  const void* scale;            /* [rows], policy: the row's weight in the loss; 0: it takes no part */
  const void* old_logprobs;     /* [rows], policy; NULL: the ratio is 1 */
  const void* ref_logprobs;     /* [rows], policy; NULL: no KL term */
  const void* sampler_logprobs; /* [rows], policy; needed where the objective corrects for the sampler */
  const void* entropy_weight;   /* [rows], gradients; NULL for zeros */
  void* logprobs;               /* [rows] out, score and policy */
  void* entropy;                /* [rows] out, score and policy */
  void* coefficient;            /* [rows] out in policy, in in gradients */
} arft_rows;

/* Instruction sets that the CPU library holds its row kernels in. */
typedef enum { ARFT_ISA_BEST = -1, ARFT_ISA_PORTABLE = 0, ARFT_ISA_AVX2 = 1, ARFT_ISA_AVX512 = 2 } arft_isa;

/* The best arft_isa that this build holds and this CPU has. */
ARFT_API int32_t arft_cpu_isa(void);

/* Rows on the CPU: float or double, the gradient in the dtype of the logits. The result depends on `isa` (arft_isa) in
 * the last digits, never on `threads`. With more than one thread it uses the process's OpenMP runtime if its symbols
 * are visible when the library is loaded, else one thread. */
ARFT_API int32_t arft_policy_rows(const arft_rows* rows, const arft_transform* transform,
                                  const arft_row_objective* objective, int32_t threads, int32_t isa);

/* The same on a CUDA device, in a library of its own (libarft_cuda.so, which also has arft_abi_version): logits float,
 * bfloat16 or float16; the gradient in their dtype, or bfloat16 or float16 for float logits. Pointers are of `device`,
 * `stream` is a cudaStream_t of it. Returns once the work is queued. A token id outside the vocabulary is a trap. */
ARFT_API int32_t arft_cuda_policy_rows(const arft_rows* rows, const arft_transform* transform,
                                       const arft_row_objective* objective, int32_t device, void* stream);

/* What the CUDA runtime said when this thread last got ARFT_CUDA_ERROR; never NULL. */
ARFT_API const char* arft_cuda_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* ARFT_H */
