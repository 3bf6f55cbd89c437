// Row kernels on the CPU: checks, the choice of an instruction set, threads. policy_rows_isa.cpp holds the loops.

#include "arft.h"
#include "policy_rows_check.h"

#ifdef _OPENMP
// The library is not linked to an OpenMP runtime: a second one beside torch's would fight it for the cores. It uses the
// one whose symbols are global in the process when it is loaded; being weak, they are null where there is none.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_get_num_threads(void);
__attribute__((weak)) int omp_get_thread_num(void);
}
#endif

#define ARFT_DECLARE_ROWS(isa)                                                                                       \
  namespace arft {                                                                                                   \
  namespace isa {                                                                                                    \
  void rows_f32(const arft_rows&, const arft_transform&, const arft_row_objective*, int64_t begin, int64_t end);     \
  void rows_f64(const arft_rows&, const arft_transform&, const arft_row_objective*, int64_t begin, int64_t end);     \
  }                                                                                                                  \
  }

ARFT_DECLARE_ROWS(portable)
#ifdef ARFT_X86
ARFT_DECLARE_ROWS(avx2)
ARFT_DECLARE_ROWS(avx512)
#endif

namespace {

using Rows = void (*)(const arft_rows&, const arft_transform&, const arft_row_objective*, int64_t, int64_t);

Rows kernel(int32_t isa, bool wide) {
#ifdef ARFT_X86
  if (isa == ARFT_ISA_AVX512) return wide ? arft::avx512::rows_f64 : arft::avx512::rows_f32;
  if (isa == ARFT_ISA_AVX2) return wide ? arft::avx2::rows_f64 : arft::avx2::rows_f32;
#endif
  (void)isa;
  return wide ? arft::portable::rows_f64 : arft::portable::rows_f32;
}

bool has_threads() {
#ifdef _OPENMP
  return GOMP_parallel && omp_get_num_threads && omp_get_thread_num;
#else
  return false;
#endif
}

arft_status check(const arft_rows& rows, int32_t isa) {
  if (rows.logits_dtype != ARFT_F32 && rows.logits_dtype != ARFT_F64) return ARFT_BAD_DTYPE;
  if (rows.gradient && rows.gradient_dtype != rows.logits_dtype) return ARFT_BAD_DTYPE;
  if (isa < ARFT_ISA_BEST || isa > arft_cpu_isa()) return ARFT_BAD_ISA;
  for (int64_t i = 0; i < rows.rows; ++i) {
    if (rows.token_ids[i] < 0 || rows.token_ids[i] >= rows.vocabulary) return ARFT_BAD_TOKEN;
  }
  return ARFT_OK;
}

}  // namespace

int32_t arft_cpu_isa(void) {
#ifdef ARFT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return ARFT_ISA_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return ARFT_ISA_AVX2;
#endif
  return ARFT_ISA_PORTABLE;
}

int32_t arft_policy_rows(const arft_rows* rows, const arft_transform* transform, const arft_row_objective* objective,
                         int32_t threads, int32_t isa) {
  arft_status status = arft::check(rows, transform, objective);
  if (status == ARFT_OK) status = check(*rows, isa);
  if (status != ARFT_OK) return status;

  const Rows run = kernel(isa == ARFT_ISA_BEST ? arft_cpu_isa() : isa, rows->logits_dtype == ARFT_F64);
  if (threads <= 1 || !has_threads() || rows->rows * rows->vocabulary < 65536) {
    run(*rows, *transform, objective, 0, rows->rows);
    return ARFT_OK;
  }
  // Rows without a gradient are cheap and often come together: dealt out in turn, they burden all threads alike.
  const int64_t size = rows->vocabulary < 1024 ? 64 : 1, chunks = (rows->rows + size - 1) / size;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t end = (c + 1) * size;
    run(*rows, *transform, objective, c * size, end < rows->rows ? end : rows->rows);
  }
  return ARFT_OK;
}
