// Symmetric 4-bit codes (uint4b8: value = code - 8) to pairs of fp16 or bf16.
//
// A word holds the eight codes that one lane contributes to the A operand of an m16n8k16 (or, per
// warp, of an m64nNk16 wgmma) product. Nibble p belongs to
//     register   p = 0, 4 -> a[0]   p = 1, 5 -> a[2]   p = 2, 6 -> a[1]   p = 3, 7 -> a[3]
// and nibble p + 4 is the upper half of the pair. So the mask 0x000f000f finds a whole pair at
// once, and the on-disk Marlin order needs no further shuffling.
//
// fp16: 0x6400 is 1024, where one unit in the last place is 1: OR-ing a code into bits 0-3 gives
//   1024 + code, and into bits 4-7 gives 1024 + 16 * code. Both minus bias are exact:
//     (1024 + code) - 1032             = code - 8
//     (1024 + 16 code) / 16 - 72       = code - 8     (one fused multiply-add)
// bf16: 0x4300 is 128 with the unit at bit 0, but only seven mantissa bits: each pair is shifted
// down.
//     (128 + code) - 136               = code - 8
// The scale is never folded into these steps: 1032 * scale would round.
#pragma once

#include "common/types.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

constexpr uint32_t kLowNibbles = 0x000f000f;
constexpr uint32_t kHighNibbles = 0x00f000f0;
constexpr uint32_t kHalf1024 = 0x64006400;       // {1024, 1024}
constexpr uint32_t kHalfMinus1032 = 0xe408e408;  // {-1032, -1032}
constexpr uint32_t kHalfSixteenth = 0x2c002c00;  // {1/16, 1/16}
constexpr uint32_t kHalfMinus72 = 0xd480d480;    // {-72, -72}
constexpr uint32_t kBf16_128 = 0x43004300;       // {128, 128}
constexpr uint32_t kBf16_2To127 = 0x7f007f00;    // {2^127, 2^127}
constexpr uint32_t kBf16Minus136 = 0xc308c308;   // {-136, -136}

// One word to the four registers of an A fragment, values code - 8, exact.
__device__ __forceinline__ void int4_to_fragment(uint32_t (&a)[4], uint32_t word, __half) {
  const uint32_t upper = word >> 8;
  a[0] = ptx::add2(ptx::and_or(word, kLowNibbles, kHalf1024), kHalfMinus1032, __half());
  a[2] = ptx::fma2(ptx::and_or(word, kHighNibbles, kHalf1024), kHalfSixteenth, kHalfMinus72,
                   __half());
  a[1] = ptx::add2(ptx::and_or(upper, kLowNibbles, kHalf1024), kHalfMinus1032, __half());
  a[3] = ptx::fma2(ptx::and_or(upper, kHighNibbles, kHalf1024), kHalfSixteenth, kHalfMinus72,
                   __half());
}

__device__ __forceinline__ void int4_to_fragment(uint32_t (&a)[4], uint32_t word, __nv_bfloat16) {
  constexpr int kRegisterOfShift[4] = {0, 2, 1, 3};
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[kRegisterOfShift[i]] =
        ptx::add2(ptx::and_or(word >> (4 * i), kLowNibbles, kBf16_128), kBf16Minus136,
                  __nv_bfloat16());
}

// Scales of the two rows of a fragment (g and g + 8), as pairs ready to multiply with.
template <class Scalar>
struct RowScales;

template <>
struct RowScales<__half> {
  uint32_t row[2];
  // scales: {scale of row g, scale of row g + 8}
  __device__ __forceinline__ explicit RowScales(uint32_t scales)
      : row{ptx::permute_bytes(scales, scales, 0x1010),
            ptx::permute_bytes(scales, scales, 0x3232)} {}
  // a *= scale: code - 8 is exact, so the product rounds once.
  __device__ __forceinline__ void apply(uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], row[i % 2], __half());
  }
};

// bf16 holds 8 of the 11 bits of an fp16 scale: high + low part are exact, and the fused sum of
// both products rounds (all but) once.
template <>
struct RowScales<__nv_bfloat16> {
  uint32_t high[2], low[2];
  // unit: a power of two that multiplies the scales
  __device__ __forceinline__ explicit RowScales(uint32_t scales, float unit = 1.f) {
    const float2 s = __half22float2(*reinterpret_cast<const __half2*>(&scales));
    split(s.x * unit, high[0], low[0]);
    split(s.y * unit, high[1], low[1]);
  }
  __device__ __forceinline__ void apply(uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = ptx::fma2(a[i], high[i % 2], ptx::mul2(a[i], low[i % 2], __nv_bfloat16()),
                       __nv_bfloat16());
  }

 private:
  static __device__ __forceinline__ void split(float s, uint32_t& high, uint32_t& low) {
    const __nv_bfloat16 h = __float2bfloat16_rn(s);
    const __nv_bfloat162 hh(h, h);
    const __nv_bfloat16 l = __float2bfloat16_rn(s - __bfloat162float(h));
    const __nv_bfloat162 ll(l, l);
    high = *reinterpret_cast<const uint32_t*>(&hh);
    low = *reinterpret_cast<const uint32_t*>(&ll);
  }
};

}  // namespace dequant
