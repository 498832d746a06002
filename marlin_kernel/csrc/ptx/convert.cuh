// Conversions of fp32 to bytes, to nearest, ties to even; and of bytes to fp16.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
#pragma once

#include "common/types.cuh"

namespace ptx {

// cvt.rni.sat.s8.f32, four times: values to int8, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_bytes(const float (&v)[4], int8_t) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int byte;
    asm("cvt.rni.sat.s8.f32 %0, %1;\n" : "=r"(byte) : "f"(v[i]));
    word |= (byte & 0xff) << (8 * i);
  }
  return word;
}

// cvt.rn.satfinite.e4m3x2.f32, twice (sm_89 and newer): values to e4m3.
__device__ __forceinline__ uint32_t pack_bytes(const float (&v)[4], float8_e4m3) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(low) : "f"(v[1]), "f"(v[0]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(high) : "f"(v[3]), "f"(v[2]));
  return low | static_cast<uint32_t>(high) << 16;
}

// cvt.rn.f16x2.e4m3x2 (sm_89 and newer): two bytes, e4m3, to fp16; exact. `high`: the two upper ones.
__device__ __forceinline__ uint32_t e4m3_pair_to_half2(uint32_t bytes, bool high) {
  uint32_t pair;
  if (high)
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h;}\n"
        : "=r"(pair)
        : "r"(bytes));
  else
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}\n"
        : "=r"(pair)
        : "r"(bytes));
  return pair;
}

}  // namespace ptx
