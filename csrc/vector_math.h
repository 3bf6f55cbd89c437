// exp and tanh without branches or calls in float, so that compilers vectorise the loops around them; double and the
// GPU use the library's.
//
// Everything lies in a namespace named after the instruction set that it is compiled for: the linker must not replace
// the portable copy of a function by the AVX-512 one.
#ifndef ARFT_VECTOR_MATH_H
#define ARFT_VECTOR_MATH_H

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define ARFT_HD __host__ __device__ __forceinline__
#else
#define ARFT_HD inline __attribute__((always_inline))
#endif

#ifndef ARFT_ISA
#define ARFT_ISA host
#endif

namespace arft {
namespace ARFT_ISA {

ARFT_HD float log1p_(float x) { return ::log1pf(x); }
ARFT_HD double log1p_(double x) { return ::log1p(x); }
ARFT_HD float log_(float x) { return ::logf(x); }
ARFT_HD double log_(double x) { return ::log(x); }
ARFT_HD float expm1_(float x) { return ::expm1f(x); }
ARFT_HD double expm1_(double x) { return ::expm1(x); }
ARFT_HD float abs_(float x) { return ::fabsf(x); }
ARFT_HD double abs_(double x) { return ::fabs(x); }
ARFT_HD float copysign_(float x, float sign) { return ::copysignf(x, sign); }
ARFT_HD double copysign_(double x, double sign) { return ::copysign(x, sign); }

// exp_ is 0 here, a little below the smallest normal number, and takes nothing lower. A clamp before it is the only
// comparison in the loops: given two, compilers branch between them and vectorise nothing.
template <class S>
ARFT_HD constexpr S lowest_exponent() {
  return sizeof(S) == sizeof(float) ? S(-88) : S(-709);
}

template <class S>
ARFT_HD S at_least_lowest(S x) {
  return x < lowest_exponent<S>() ? lowest_exponent<S>() : x;
}

// exp(x) for lowest_exponent <= x <= 88 (709), with exp(lowest_exponent) = 0; NaN stays NaN.
ARFT_HD double exp_(double x) { return x == lowest_exponent<double>() ? 0.0 : ::exp(x); }

ARFT_HD float exp_(float x) {
#ifdef __CUDA_ARCH__
  return x == lowest_exponent<float>() ? 0.0f : ::expf(x);
#else
  // x = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const float shifter = 12582912.0f;
  const float shifted = x * 1.44269504f + shifter;
  const float n = shifted - shifter;
  // ln 2 in two parts; n times the first is exact, with or without a fused multiply-add.
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // Minimax for exp(r) = 1 + r + r^2 (...) on |r| <= 0.3467: relative error 3e-9 before rounding.
  float tail = 1.3814539e-3f;
  tail = tail * r + 8.3687454e-3f;
  tail = tail * r + 4.1668389e-2f;
  tail = tail * r + 1.6666521e-1f;
  tail = tail * r + 0.49999994f;
  const float mantissa = 1.0f + (r + r * r * tail);
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^n; for n = -127 they are those of 0
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return mantissa * power;
#endif
}

// tanh and its slope 1 - tanh^2; both keep their digits at either end.
template <class S>
struct Tanh {
  S value, slope;
};

template <class S>
ARFT_HD Tanh<S> tanh_(S x) {
  const S size = abs_(x);
  const S e = exp_(at_least_lowest(S(-2) * size));
  const S slope = S(4) * e / ((S(1) + e) * (S(1) + e));
#ifndef __CUDA_ARCH__
  if constexpr (sizeof(S) == sizeof(float)) {
    // Odd minimax polynomial below 0.55, where 1 - e would lose digits: relative error 1e-9 before rounding.
    const S u = size * size;
    S tail = S(-6.2742392e-3);
    tail = tail * u + S(2.1071678e-2);
    tail = tail * u + S(-5.3852309e-2);
    tail = tail * u + S(1.3332586e-1);
    tail = tail * u + S(-3.3333317e-1);
    const S near = size + size * u * tail, far = (S(1) - e) / (S(1) + e);
    return {copysign_(size < S(0.55) ? near : far, x), slope};
  } else {
    return {::tanh(x), slope};
  }
#else
  return {S(::tanhf(float(x))), slope};
#endif
}

}  // namespace ARFT_ISA
}  // namespace arft

#endif
