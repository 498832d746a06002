// 8-bit integer codes to pairs of fp16 or bf16 (dequant/dequantizer.cuh).
//
// Bytes of a word: k, k + 8, k + 1, k + 9 of one feature (FORMAT.md). Bytes 0 and 2 are the pair of
// one register, bytes 1 and 3 that of another.
//   fp16: prmt puts 0x64 above each byte: 1024 + q, and subtracting 1024 + z is exact.
//   bf16: a number whose upper byte is zero is its lower byte * 2^-133, since subnormals and the
//     first normal numbers have the same unit. So q is there as it lies, and one fused multiply-add
//     makes (q - 128) / 64 of it, or (q - z) / 64: eight significant bits at most, exact.
// Zero points of a lane's eight features are the bytes of two words, in order of features.
#pragma once

#include "dequant/dequantizer.cuh"
#include "dequant/int4.cuh"
#include "dequant/scales.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

constexpr uint32_t kHalfMinus1152 = 0xe480e480;  // {-1152, -1152}

// Bytes 0 and 2 (or, with kOddBytes, 1 and 3) of a word as 1024 + q.
constexpr uint32_t kEvenBytes = 0x4240, kOddBytes = 0x4341;
__device__ __forceinline__ uint32_t byte_pair_plus_1024(uint32_t word, uint32_t selector) {
  return ptx::permute_bytes(word, 0x64646464, selector);
}

constexpr uint32_t kBf16Minus2To127 = 0xff00ff00;
constexpr uint32_t kBf16MinusTwo = 0xc000c000;  // {-2, -2}

// (q + 64 offset) / 64 of bytes 0 and 2, and of bytes 1 and 3, of a word.
__device__ __forceinline__ void bytes_over_64(uint32_t& even, uint32_t& odd, uint32_t word,
                                              uint32_t offset) {
  even = ptx::fma2(word & 0x00ff00ff, kBf16_2To127, offset, __nv_bfloat16());
  odd = ptx::fma2(ptx::permute_bytes(word, 0, 0x4341), kBf16_2To127, offset, __nv_bfloat16());
}

template <>
struct Dequantizer<weights::uint8b128, __half> : HalfScales<__half> {
  static constexpr int WORDS = 2;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t*, int) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      a[row] = ptx::add2(byte_pair_plus_1024(words[row], kEvenBytes), kHalfMinus1152, __half());
      a[row + 2] = ptx::add2(byte_pair_plus_1024(words[row], kOddBytes), kHalfMinus1152, __half());
    }
  }
};

template <>
struct Dequantizer<weights::uint8b128, __nv_bfloat16> : HalfScales<__nv_bfloat16> {
  static constexpr int WORDS = 2;
  static constexpr float UNIT = 64.f, SCALED_UNIT = 64.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t*, int) {
#pragma unroll
    for (int row = 0; row < 2; row++) bytes_over_64(a[row], a[row + 2], words[row], kBf16MinusTwo);
  }
};

template <>
struct Dequantizer<weights::uint8, __half> : HalfScales<__half> {
  static constexpr int WORDS = 2;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t* zeros, int j) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int index = 2 * j + row;
      // 0xe4 above the byte: -(1024 + z), twice
      const uint32_t z = ptx::permute_bytes(zeros[index / 4], 0xe4e4e4e4,
                                            0x4040 | index % 4 | (index % 4) << 8);
      a[row] = ptx::add2(byte_pair_plus_1024(words[row], kEvenBytes), z, __half());
      a[row + 2] = ptx::add2(byte_pair_plus_1024(words[row], kOddBytes), z, __half());
    }
  }
};

template <>
struct Dequantizer<weights::uint8, __nv_bfloat16> : HalfScales<__nv_bfloat16> {
  static constexpr int WORDS = 2;
  static constexpr float UNIT = 64.f, SCALED_UNIT = 64.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t* zeros, int j) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int index = 2 * j + row;
      const uint32_t byte =
          ptx::permute_bytes(zeros[index / 4], 0, 0x4040 | index % 4 | (index % 4) << 8);
      const uint32_t z = ptx::mul2(byte, kBf16Minus2To127, __nv_bfloat16());
      bytes_over_64(a[row], a[row + 2], words[row], z);
    }
  }
};

}  // namespace dequant
