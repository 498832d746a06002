// 4-bit integer codes with any kind of zero point, to pairs of fp16 or bf16 (dequant/dequantizer.cuh).
//
// Constant zero point 8: dequant/int4.cuh. A stored one takes the place of the constant there. The
// zero points of a lane's eight features are nibbles of one word: nibble j belongs to row g of tile
// j, nibble j + 4 to row g + 8, so that the mask 0x000f000f, after a shift by 4 j, finds both:
//   fp16: 0xe400 is -1024:  -(1024 + z), and + 960:  -(64 + z). Then
//     (1024 + q) - (1024 + z)  and  (1024 + 16 q) / 16 - (64 + z)    are q - z, exact
//   bf16: 0xc300 is -128:   (128 + q) - (128 + z)
// Zero points in fp16 (HQQ) are subtracted from q, which rounds once: a weight then is as exact as
// its 16-bit type can hold it.
#pragma once

#include "dequant/dequantizer.cuh"
#include "dequant/int4.cuh"
#include "dequant/scales.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

constexpr uint32_t kHalfMinus1024 = 0xe400e400;
constexpr uint32_t kHalf960 = 0x63806380;
constexpr uint32_t kHalfMinus64 = 0xd400d400;
constexpr uint32_t kBf16Minus128 = 0xc300c300;
constexpr uint32_t kLowRow = 0x1010, kHighRow = 0x3232;  // selectors: one half of a register, twice

// q + low[row] for codes in bits 0-3 of their half, q + high[row] for those in bits 4-7.
__device__ __forceinline__ void int4_minus(uint32_t (&a)[4], uint32_t word, const uint32_t (&low)[2],
                                           const uint32_t (&high)[2], __half) {
  const uint32_t upper = word >> 8;
  a[0] = ptx::add2(ptx::and_or(word, kLowNibbles, kHalf1024), low[0], __half());
  a[2] = ptx::fma2(ptx::and_or(word, kHighNibbles, kHalf1024), kHalfSixteenth, high[0], __half());
  a[1] = ptx::add2(ptx::and_or(upper, kLowNibbles, kHalf1024), low[1], __half());
  a[3] = ptx::fma2(ptx::and_or(upper, kHighNibbles, kHalf1024), kHalfSixteenth, high[1], __half());
}

__device__ __forceinline__ void int4_minus(uint32_t (&a)[4], uint32_t word, const uint32_t (&low)[2],
                                           const uint32_t (&)[2], __nv_bfloat16) {
  constexpr int kRegisterOfShift[4] = {0, 2, 1, 3};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = kRegisterOfShift[i];
    a[r] = ptx::add2(ptx::and_or(word >> (4 * i), kLowNibbles, kBf16_128), low[r % 2],
                     __nv_bfloat16());
  }
}

template <class Scalar>
struct Dequantizer<weights::uint4b8, Scalar> : HalfScales<Scalar> {
  static constexpr int WORDS = 1;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int) {
    int4_to_fragment(a, words[0], Scalar());
  }
};

template <>
struct Dequantizer<weights::uint4, __half> : HalfScales<__half> {
  static constexpr int WORDS = 1;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t* zeros, int j) {
    const uint32_t z = ptx::and_or(zeros[0] >> (4 * j), kLowNibbles, kHalfMinus1024);
    const uint32_t z_high = ptx::add2(z, kHalf960, __half());
    const uint32_t low[2] = {ptx::permute_bytes(z, z, kLowRow), ptx::permute_bytes(z, z, kHighRow)};
    const uint32_t high[2] = {ptx::permute_bytes(z_high, z_high, kLowRow),
                              ptx::permute_bytes(z_high, z_high, kHighRow)};
    int4_minus(a, words[0], low, high, __half());
  }
};

template <>
struct Dequantizer<weights::uint4, __nv_bfloat16> : HalfScales<__nv_bfloat16> {
  static constexpr int WORDS = 1;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t* zeros, int j) {
    const uint32_t z = ptx::and_or(zeros[0] >> (4 * j), kLowNibbles, kBf16Minus128);
    const uint32_t low[2] = {ptx::permute_bytes(z, z, kLowRow), ptx::permute_bytes(z, z, kHighRow)};
    int4_minus(a, words[0], low, low, __nv_bfloat16());
  }
};

template <>
struct Dequantizer<weights::uint4_hqq, __half> : HalfScales<__half> {
  static constexpr int WORDS = 1;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t* zeros, int j) {
    constexpr uint32_t low[2] = {kHalfMinus1024, kHalfMinus1024};
    constexpr uint32_t high[2] = {kHalfMinus64, kHalfMinus64};
    int4_minus(a, words[0], low, high, __half());
    const uint32_t z = zeros[j] ^ 0x80008000;
    const uint32_t rows[2] = {ptx::permute_bytes(z, z, kLowRow), ptx::permute_bytes(z, z, kHighRow)};
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::add2(a[i], rows[i % 2], __half());
  }
};

// The zero point as a sum of two bf16 numbers, largest first: q minus the first is nearly always
// exact.
template <>
struct Dequantizer<weights::uint4_hqq, __nv_bfloat16> : HalfScales<__nv_bfloat16> {
  static constexpr int WORDS = 1;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t* zeros, int j) {
    constexpr uint32_t bias[2] = {kBf16Minus128, kBf16Minus128};
    int4_minus(a, words[0], bias, bias, __nv_bfloat16());
    const RowScales<__nv_bfloat16> z(zeros[j] ^ 0x80008000);
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = ptx::add2(ptx::add2(a[i], z.high[i % 2], __nv_bfloat16()), z.low[i % 2],
                       __nv_bfloat16());
  }
};

}  // namespace dequant
