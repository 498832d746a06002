// float8_e4m3fn codes to pairs of fp16 or bf16 (dequant/dequantizer.cuh).
//
// Bytes of a word: k, k + 8, k + 1, k + 9 of one feature. With a byte in the upper half of its 16
// bits, its sign is in place and its seven other bits move down to where the wider type has the end
// of its exponent and the start of its mantissa:
//   fp16: by 1. The exponent's bias is 15 instead of 7: the register holds w * 2^-8. Subnormals are
//     subnormals there too, and exact.
//   bf16: by 4. Bias 127: w * 2^-120, and a product with 2^120 is exact.
#pragma once

#include "dequant/dequantizer.cuh"
#include "dequant/scales.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

template <>
struct Dequantizer<weights::float8_e4m3fn, __half> {
  static constexpr int WORDS = 2;
  static constexpr float UNIT = 256.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t*, int) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      a[row] = upper_bytes(words[row] << 8);
      a[row + 2] = upper_bytes(words[row]);
    }
  }
  // Values first, then scales: a scale times 256 may be out of range, and a value times a small
  // scale would lose bits if it still lacked its 256.
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], 0x5c005c00, __half());  // 256
    RowScales<__half>(scales[j]).apply(a);
  }

 private:
  static __device__ __forceinline__ uint32_t upper_bytes(uint32_t word) {
    return ptx::and_or(word >> 1, 0x3f803f80, word & 0x80008000);
  }
};

// Bytes 0 and 2, and bytes 1 and 3, of a word as bf16, times 2^-120.
__device__ __forceinline__ void e4m3_over_2_120(uint32_t& even, uint32_t& odd, uint32_t word) {
  even = ptx::and_or(word << 4, 0x07f007f0, word << 8 & 0x80008000);
  odd = ptx::and_or(word >> 4, 0x07f007f0, word & 0x80008000);
}

template <>
struct Dequantizer<weights::float8_e4m3fn, __nv_bfloat16> : HalfScales<__nv_bfloat16> {
  static constexpr int WORDS = 2;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t*, int) {
#pragma unroll
    for (int row = 0; row < 2; row++) e4m3_over_2_120(a[row], a[row + 2], words[row]);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], 0x7b807b80, __nv_bfloat16());  // 2^120
  }
};

}  // namespace dequant
