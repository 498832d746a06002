// float4_e2m1f codes (NVFP4, MXFP4) to pairs of fp16 or bf16, times the scales of their groups
// (dequant/dequantizer.cuh). Nibbles lie as in dequant/int4.cuh.
//
// A nibble has a sign, two bits of exponent (bias 1) and one of mantissa. With the nibble on top of
// its 16 bits the sign is in place; the other three move down to the end of the wider exponent:
//   fp16: by 3. Bias 15: the register holds w * 2^-14 (its 0.5 a subnormal).
//   bf16: by 6. Bias 127: w * 2^-126.
// The scale, which every 16 or 32 k share, brings the missing power of two with it as far as the
// range allows; products with scales are exact (dequant/scales.cuh).
#pragma once

#include "dequant/dequantizer.cuh"
#include "dequant/scales.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

template <class Scalar>
__device__ __forceinline__ void float4_to_fragment(uint32_t (&a)[4], uint32_t word) {
  constexpr bool kHalf = kIsSame<Scalar, __half>;
  constexpr uint32_t kMask = kHalf ? 0x0e000e00 : 0x01c001c0;
  constexpr int kDown = kHalf ? 3 : 6;
  constexpr int kRegisterOfNibble[4] = {0, 2, 1, 3};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int up = 12 - 4 * i;  // brings nibbles i and i + 4 to the top
    const uint32_t magnitude = up > kDown ? word << (up - kDown) : word >> (kDown - up);
    a[kRegisterOfNibble[i]] = ptx::and_or(magnitude, kMask, word << up & 0x80008000);
  }
}

template <>
struct Dequantizer<weights::nvfp4, __half> {
  static constexpr int WORDS = 1;
  // w * s = 2^14 * (w * 2^-14) * s, and the register holds s * 2^7
  static constexpr float UNIT = 16384.f, SCALED_UNIT = 16384.f * E4m3Scales<__half>::SCALE_UNIT;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int) {
    float4_to_fragment<__half>(a, words[0]);
  }
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
    const uint32_t rows[2] = {E4m3Scales<__half>::row(scales, 2 * j),
                              E4m3Scales<__half>::row(scales, 2 * j + 1)};
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], rows[i % 2], __half());
  }
};

template <>
struct Dequantizer<weights::nvfp4, __nv_bfloat16> {
  static constexpr int WORDS = 1;
  static constexpr float UNIT = 85070591730234615865843651857942052864.f;  // 2^126
  static constexpr float SCALED_UNIT = UNIT * E4m3Scales<__nv_bfloat16>::SCALE_UNIT;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int) {
    float4_to_fragment<__nv_bfloat16>(a, words[0]);
  }
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
    const uint32_t rows[2] = {E4m3Scales<__nv_bfloat16>::row(scales, 2 * j),
                              E4m3Scales<__nv_bfloat16>::row(scales, 2 * j + 1)};
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], rows[i % 2], __nv_bfloat16());
  }
};

template <>
struct Dequantizer<weights::mxfp4, __nv_bfloat16> {
  static constexpr int WORDS = 1;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int) {
    float4_to_fragment<__nv_bfloat16>(a, words[0]);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], 0x7e807e80, __nv_bfloat16());  // 2^126
  }
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
    const uint32_t rows[2] = {E8m0Scales<__nv_bfloat16>::row(scales, 2 * j),
                              E8m0Scales<__nv_bfloat16>::row(scales, 2 * j + 1)};
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], rows[i % 2], __nv_bfloat16());
  }
};

}  // namespace dequant
