// bfloat16 for g++: the upper 16 bits of a float.
#pragma once

#include "cuda_fp16.h"

struct __nv_bfloat16 {
  uint16_t bits = 0;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) : x(low), y(high) {}
};

namespace emu {
inline float bf16_bits_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float v;
  memcpy(&v, &wide, 4);
  return v;
}
inline uint16_t float_to_bf16_bits(float v) {
  uint32_t wide;
  memcpy(&wide, &v, 4);
  if (v != v) return 0x7fff;
  return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // to nearest, ties to even
}
}  // namespace emu

inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {emu::float_to_bf16_bits(v)}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return {emu::float_to_bf16_bits(v)}; }
inline float __bfloat162float(__nv_bfloat16 v) { return emu::bf16_bits_to_float(v.bits); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
