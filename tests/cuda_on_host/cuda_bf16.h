#pragma once
#include <cstdint>

struct __nv_bfloat16 { uint16_t bits; };  // the upper half of a float's
inline float __bfloat162float(__nv_bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return {x != x ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // halfway: to even
}
