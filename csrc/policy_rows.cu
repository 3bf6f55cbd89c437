// Row kernels on CUDA: one block a row, two passes over it.
//
// Pass 1 gathers the softmax statistics, from the end of the row to its start; pass 2 reads it again from the start,
// where the L2 cache still holds most of it, and writes the gradient. 152,064 float32 logits are 608 KB, more than a
// multiprocessor can keep. Sums run in float32 in a fixed order: the same numbers from run to run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

#define ARFT_ISA cuda
#include "policy_row.h"
#include "policy_rows_check.h"

namespace {

using namespace arft::cuda;

constexpr int kWarp = 32;
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWidth = 8;  // elements that a thread takes of a tile
constexpr int kTile = kThreads * kWidth;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kWarps == kWarp, "the second stage of the reduction is one warp");

struct Arguments {
  arft_rows rows;
  Transform<float> transform;
  Objective<float> objective;
  bool has_objective;
  bool vectorised;  // every row of logits and gradient, and the bias, start at a multiple of 16 bytes
};

// What thread 0 tells the others about a row.
struct Decision {
  Factors<float> factors;
  float base;
  bool has_gradient;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

// kWidth neighbouring elements, moved 16 bytes at a time.
template <class T>
union Vector {
  uint4 quads[kWidth * sizeof(T) / sizeof(uint4)];
  T elements[kWidth];
  __device__ Vector() {}
};

// A thread's elements of the tile that starts at `tile`: neighbours where 16 bytes move at once; else far apart, so
// that the threads of a warp touch neighbours.
struct Share {
  int first, step;

  __device__ Share(int tile, bool vectorised)
      : first(tile + int(threadIdx.x) * (vectorised ? kWidth : 1)), step(vectorised ? 1 : kThreads) {}
  __device__ int at(int e) const { return first + e * step; }
  __device__ bool whole(int vocabulary) const { return step == 1 && first + kWidth <= vocabulary; }
};

// Logits with their bias; -inf past the end of the row. Plain loads: the read-only path does not allow for a gradient
// that is written over the logits.
template <class L>
__device__ __forceinline__ void load(const L* row, const float* bias, int vocabulary, const Share& share,
                                     float (&x)[kWidth]) {
  if (share.whole(vocabulary)) {
    Vector<L> v;
#pragma unroll
    for (int q = 0; q < int(sizeof(v.quads) / sizeof(uint4)); ++q) {
      v.quads[q] = reinterpret_cast<const uint4*>(row + share.first)[q];
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = widen(v.elements[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = share.at(e) < vocabulary ? widen(row[share.at(e)]) : -INFINITY;
  }
  if (bias == nullptr) return;
  if (share.whole(vocabulary)) {
#pragma unroll
    for (int q = 0; q < kWidth / 4; ++q) {
      const float4 b = __ldg(reinterpret_cast<const float4*>(bias + share.first) + q);
      x[4 * q] += b.x;
      x[4 * q + 1] += b.y;
      x[4 * q + 2] += b.z;
      x[4 * q + 3] += b.w;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (share.at(e) < vocabulary) x[e] += __ldg(bias + share.at(e));
    }
  }
}

template <class G>
__device__ __forceinline__ void store(const float (&values)[kWidth], G* row, int vocabulary, const Share& share) {
  if (share.whole(vocabulary)) {
    Vector<G> v;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) narrow(values[e], v.elements[e]);
#pragma unroll
    for (int q = 0; q < int(sizeof(v.quads) / sizeof(uint4)); ++q) {
      reinterpret_cast<uint4*>(row + share.first)[q] = v.quads[q];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (share.at(e) < vocabulary) narrow(values[e], row[share.at(e)]);
    }
  }
}

// This thread's part of the statistics of the ids other than the token.
template <class L>
__device__ __forceinline__ Others<float> pass_1(const Arguments& a, const L* row, int vocabulary, int token) {
  const Transform<float>& f = a.transform;
  Others<float> mine = {-INFINITY, 0.0f, 0.0f};
  for (int tile = (vocabulary - 1) / kTile * kTile; tile >= 0; tile -= kTile) {
    const Share share(tile, a.vectorised);
    float z[kWidth];
    load(row, static_cast<const float*>(a.rows.bias), vocabulary, share, z);
    float top = mine.top;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      z[e] = share.at(e) == token ? -INFINITY : reduced(f, z[e], f.capped).z;
      top = z[e] > top ? z[e] : top;
    }
    mine = rebase(mine, top, f.k);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float d = exponent(z[e], base(top), f.k), p = exp_(d);
      mine.sum += p;
      mine.weighted += p * d;
    }
  }
  return mine;
}

__device__ __forceinline__ Others<float> reduce_warp(Others<float> mine, float k) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Others<float> other = {__shfl_down_sync(kAll, mine.top, distance),
                                 __shfl_down_sync(kAll, mine.sum, distance),
                                 __shfl_down_sync(kAll, mine.weighted, distance)};
    mine = merge(mine, other, k);
  }
  return mine;  // complete in lane 0
}

__device__ __forceinline__ float at(const void* values, int64_t i) {
  return values ? static_cast<const float*>(values)[i] : 0.0f;
}

// Thread 0: the row's outputs, its coefficients, and the constants of pass 2.
__device__ __forceinline__ Decision decide(const Arguments& a, int64_t i, const Others<float>& others, float x) {
  const Transform<float>& f = a.transform;
  const Reduced<float> own = reduced(f, x, f.capped);
  const Row<float> row = with_token(others, own.z, f.k);
  if (a.rows.logprobs) static_cast<float*>(a.rows.logprobs)[i] = row.logp;
  if (a.rows.entropy) static_cast<float*>(a.rows.entropy)[i] = row.entropy;
  float g, e;
  if (a.has_objective) {
    const RowInputs<float> inputs = {at(a.rows.advantage, i), at(a.rows.scale, i), at(a.rows.old_logprobs, i),
                                     at(a.rows.ref_logprobs, i), at(a.rows.sampler_logprobs, i)};
    g = coefficient(a.objective, inputs, row.logp);
    e = -a.objective.entropy_coef * inputs.scale;
    static_cast<float*>(a.rows.coefficient)[i] = g;
  } else {
    g = at(a.rows.coefficient, i);
    e = at(a.rows.entropy_weight, i);
  }
  return {gradient_factors(row, f, g, e, own.slope), row.base, a.rows.gradient && (g != 0.0f || e != 0.0f)};
}

// The gradient may lie over the logits. With narrower elements a tile of it lies over logits of the same or an earlier
// tile: all threads have read a tile before any writes it.
template <class L, class G>
__device__ __forceinline__ void pass_2(const Arguments& a, const Decision& decision, const L* row, int vocabulary,
                                       int token, G* out) {
  const Transform<float>& f = a.transform;
  for (int tile = 0; tile < vocabulary; tile += kTile) {
    const Share share(tile, a.vectorised);
    float x[kWidth];
    load(row, static_cast<const float*>(a.rows.bias), vocabulary, share, x);
    if (sizeof(G) < sizeof(L)) __syncthreads();
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float element = gradient_element(f, decision.factors, x[e], decision.base, f.capped);
      x[e] = share.at(e) == token ? decision.factors.token : element;
    }
    store(x, out, vocabulary, share);
  }
}

template <class G>
__device__ __forceinline__ void clear(int vocabulary, G* out) {
  for (int j = threadIdx.x; j < vocabulary; j += kThreads) narrow(0.0f, out[j]);
}

template <class L, class G>
__global__ void __launch_bounds__(kThreads) policy_rows(const __grid_constant__ Arguments a) {
  __shared__ Others<float> of_warp[kWarps];
  __shared__ Decision shared_decision;
  const int vocabulary = int(a.rows.vocabulary), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  for (int64_t i = blockIdx.x; i < a.rows.rows; i += gridDim.x) {
    G* out = static_cast<G*>(a.rows.gradient) + (a.rows.gradient ? i * a.rows.gradient_stride : 0);
    const bool gradients = a.rows.gradient && !a.has_objective;
    if (gradients && at(a.rows.coefficient, i) == 0.0f && at(a.rows.entropy_weight, i) == 0.0f) {
      clear(vocabulary, out);
      continue;
    }

    const L* row = static_cast<const L*>(a.rows.logits) + i * a.rows.logits_stride;
    const int64_t id = a.rows.token_ids[i];
    if (id < 0 || id >= vocabulary) __trap();
    const int token = int(id);

    Others<float> mine = reduce_warp(pass_1(a, row, vocabulary, token), a.transform.k);
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    if (warp == 0) {
      mine = reduce_warp(of_warp[lane], a.transform.k);
      if (lane == 0) {
        const float bias = a.rows.bias ? static_cast<const float*>(a.rows.bias)[token] : 0.0f;
        shared_decision = decide(a, i, mine, widen(row[token]) + bias);
      }
    }
    // Also keeps the next row from writing of_warp before warp 0 has read it.
    __syncthreads();
    const Decision decision = shared_decision;
    if (decision.has_gradient) {
      pass_2(a, decision, row, vocabulary, token, out);
    } else if (a.rows.gradient) {
      clear(vocabulary, out);
    }
  }
}

int64_t bytes(int32_t dtype) { return dtype == ARFT_F32 ? 4 : 2; }

bool on_16_bytes(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

using Kernel = void (*)(Arguments);

// NULL for a pair of dtypes that has no kernel.
Kernel kernel(int32_t logits, int32_t gradient) {
  if (logits == ARFT_F32 && gradient == ARFT_F32) return policy_rows<float, float>;
  if (logits == ARFT_F32 && gradient == ARFT_BF16) return policy_rows<float, __nv_bfloat16>;
  if (logits == ARFT_F32 && gradient == ARFT_F16) return policy_rows<float, __half>;
  if (logits == ARFT_BF16 && gradient == ARFT_BF16) return policy_rows<__nv_bfloat16, __nv_bfloat16>;
  if (logits == ARFT_F16 && gradient == ARFT_F16) return policy_rows<__half, __half>;
  return nullptr;
}

thread_local cudaError_t last_error = cudaSuccess;

// Makes `device` current, and the one before it when it goes.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before_);
    changed_ = error == cudaSuccess && device != before_;
    if (changed_) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace

int32_t arft_abi_version(void) { return ARFT_ABI_VERSION; }

const char* arft_cuda_last_error(void) { return cudaGetErrorString(last_error); }

int32_t arft_cuda_policy_rows(const arft_rows* rows, const arft_transform* transform,
                              const arft_row_objective* objective, int32_t device, void* stream) {
  const arft_status status = arft::check(rows, transform, objective);
  if (status != ARFT_OK) return status;
  const int32_t gradient_dtype = rows->gradient ? rows->gradient_dtype : rows->logits_dtype;
  const Kernel run = kernel(rows->logits_dtype, gradient_dtype);
  if (!run) return ARFT_BAD_DTYPE;
  if (rows->vocabulary > INT_MAX - kTile) return ARFT_BAD_SIZE;
  if (rows->rows == 0) return ARFT_OK;

  Arguments a = {*rows, make_transform<float>(*transform), {}, objective != nullptr, false};
  if (objective) a.objective = make_objective<float>(*objective, *rows);
  a.vectorised = on_16_bytes(rows->logits, rows->logits_stride * bytes(rows->logits_dtype)) &&
                 on_16_bytes(rows->gradient, rows->gradient_stride * bytes(gradient_dtype)) &&
                 on_16_bytes(rows->bias, 0);

  const OnDevice guard(device);
  last_error = guard.error;
  if (last_error == cudaSuccess) {
    const unsigned grid = rows->rows < INT_MAX ? unsigned(rows->rows) : unsigned(INT_MAX);
    run<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    last_error = cudaGetLastError();
  }
  return last_error == cudaSuccess ? ARFT_OK : ARFT_CUDA_ERROR;
}
