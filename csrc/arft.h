/* The C ABI of arft_fast, on one page.
 *
 * Plain pointers and sizes, row-major and contiguous; no torch, no Python, no state, no allocation that outlives a call.
 * Every function returns an arft_status; outputs are unspecified unless it is ARFT_OK. Pointers must not alias.
 * arft_fast/kernels/native.py is the only caller and mirrors the signatures.
 */
#ifndef ARFT_H
#define ARFT_H

#include <stdint.h>

#define ARFT_API __attribute__((visibility("default")))

/* Raised by one whenever a signature or a meaning below changes; native.py refuses a library of another version. */
#define ARFT_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  ARFT_OK = 0,
  ARFT_NULL_POINTER = 1, /* a required pointer is NULL though its array is not empty */
  ARFT_BAD_SIZE = 2,     /* rows or groups < 0, or components < 1 */
  ARFT_BAD_OFFSETS = 3,  /* offsets do not rise from 0 to rows */
  ARFT_BAD_SCALE = 4,    /* scale is no arft_scale */
  ARFT_BAD_EPSILON = 5,  /* epsilon is not a positive finite number */
} arft_status;

/* What an advantage is divided by. */
typedef enum {
  ARFT_SCALE_NONE = 0,  /* nothing */
  ARFT_SCALE_GROUP = 1, /* the std of its group + epsilon */
  ARFT_SCALE_BATCH = 2, /* the std of all valid rows + epsilon */
} arft_scale;

ARFT_API int32_t arft_abi_version(void);

/* Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2).
 *
 *   r_i = float(sum_k weights[k] * rewards[i][k])      a NaN component counts 0; a row of only NaN is left out
 *   A_i = (r_i - mean_g) / (std_g + epsilon)           over the valid rows of the group, std with ddof 1
 *
 * Sums run in double. A group whose valid rows all have the same r gets A = 0 and std = 0 exactly.
 *
 *   rewards    [rows][components]
 *   weights    [components], or NULL for ones
 *   offsets    [groups + 1]: group g holds the rows offsets[g] .. offsets[g + 1] - 1
 *   advantages [rows]        out; 0 for rows that are left out
 *   mean, std  [groups]      out; mean NaN without a valid row, std 0 with fewer than two
 *   no_signal  [groups]      out; 1 where every advantage of the group is 0
 */
ARFT_API int32_t arft_group_advantage_f32(const float* rewards, const float* weights, const int64_t* offsets,
                                          int64_t rows, int64_t components, int64_t groups, int32_t scale,
                                          double epsilon, float* advantages, float* mean, float* std,
                                          uint8_t* no_signal);

#ifdef __cplusplus
}
#endif

#endif /* ARFT_H */
