// Codes to the A operand in the sm_90 kernels: the interface of dequant/dequantizer.cuh, and its
// specialisations but where Hopper has better instructions or the sm_90 layout another order of bits.
//
//   Operand<Weight, Scalar, SCALED>   Tables, fragment(a, words, zeros, j, tables), UNIT,
//                                     apply(a, scales, j), SCALED_UNIT
// SCALED: in a kernel that applies scales to weights.
//   ScalePair<Weight>::get(words, j)   scales of rows g and g + 8 of row tile j, as fp32
// With j = 0, scales and zero points of these two rows may stand alone in the lowest bits.
//
// uint4b8 to bf16, SCALED (the others lack the registers for its constants): as in dequant/integer8.cuh
// the nibbles in bits 0-3 and 4-7 are q * 2^-133 and q * 2^-129 as they lie, and one fused multiply-add
// makes (q - 8) / 64 of either: one shift for a word instead of three.
//
// float8_e4m3fn to fp16: Hopper converts two bytes at once. To bf16, SCALED: scales bring 2^111 of the
// 2^120 that registers lack (an fp16 scale has room for so much in bf16), the output the rest.
//
// float4_e2m1f: a table of the eight magnitudes in two registers, from which prmt picks four bytes by
// the nibbles of a selector. In fp16 a magnitude is its upper byte alone; bf16 needs a second table.
// The selectors are the magnitudes themselves; signs lie in bit 3 of the nibbles, where a mask finds
// those of four results in place. So, of the eight codes of a lane (sm90_layout.arrange_floats):
//     magnitude of nibble q: byte q % 4 of result q / 4
//     sign of byte i of result 0: bit 8 i + 7;  of result 1: bit 8 i + 3
//     bytes 0 and 2 of result r are the pair a[2 r], bytes 1 and 3 the pair a[2 r + 1]
#pragma once

#include "dequant/dequantizer.cuh"
#include "dequant/float8.cuh"
#include "dequant/int4.cuh"
#include "dequant/integer4.cuh"
#include "dequant/integer8.cuh"
#include "ptx/bit_ops.cuh"
#include "ptx/convert.cuh"

namespace dequant {

// ---- scales ----
template <class Weight, Scales FORMAT = Weight::SCALES>
struct ScalePair;

template <class Weight>
struct ScalePair<Weight, Scales::HALF> {
  static __device__ __forceinline__ float2 get(const uint32_t* words, int j) {
    return __half22float2(*reinterpret_cast<const __half2*>(&words[j]));
  }
};

template <class Weight>
struct ScalePair<Weight, Scales::E4M3> {
  static __device__ __forceinline__ float2 get(const uint32_t* words, int j) {
    const uint32_t value = ptx::e4m3_pair_to_half2(words[j / 2], j % 2 != 0);
    return __half22float2(*reinterpret_cast<const __half2*>(&value));
  }
};

template <class Weight>
struct ScalePair<Weight, Scales::E8M0> {
  static __device__ __forceinline__ float2 get(const uint32_t* words, int j) {
    const uint32_t w = words[j / 2];
    if (j % 2 == 0)
      return make_float2(__uint_as_float((w & 0xff) << 23), __uint_as_float((w & 0xff00) << 15));
    return make_float2(__uint_as_float((w & 0xff0000) << 7), __uint_as_float(w >> 24 << 23));
  }
};

// a *= the pair of scales, which are as exact in the 16-bit type as the values.
template <class Scalar>
__device__ __forceinline__ void scale_rows(uint32_t (&a)[4], uint32_t pair) {
  const uint32_t rows[2] = {ptx::permute_bytes(pair, pair, kLowRow),
                            ptx::permute_bytes(pair, pair, kHighRow)};
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], rows[i % 2], Scalar());
}

// ---- codes ----
struct NoTables {
  __device__ __forceinline__ explicit NoTables(uint32_t) {}
};

template <class Weight, class Scalar, bool SCALED = false>
struct Operand : Dequantizer<Weight, Scalar> {
  using Tables = NoTables;
  template <int WORDS>
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[WORDS],
                                                  const uint32_t* zeros, int j, const Tables&) {
    Dequantizer<Weight, Scalar>::fragment(a, words, zeros, j);
  }
};

constexpr uint32_t kBf16_2To123 = 0x7d007d00;
constexpr uint32_t kBf16MinusEighth = 0xbe00be00;

template <>
struct Operand<weights::uint4b8, __nv_bfloat16, true> : HalfScales<__nv_bfloat16> {
  using Tables = NoTables;
  static constexpr float UNIT = 64.f, SCALED_UNIT = 64.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int, const Tables&) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint32_t word = row == 0 ? words[0] : words[0] >> 8;
      a[row] = ptx::fma2(word & kLowNibbles, kBf16_2To127, kBf16MinusEighth, __nv_bfloat16());
      a[row + 2] = ptx::fma2(word & kHighNibbles, kBf16_2To123, kBf16MinusEighth, __nv_bfloat16());
    }
  }
};

template <bool SCALED>
struct Operand<weights::float8_e4m3fn, __half, SCALED> : HalfScales<__half> {
  using Tables = NoTables;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t*, int, const Tables&) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint32_t pairs = ptx::permute_bytes(words[row], 0, 0x3120);
      a[row] = ptx::e4m3_pair_to_half2(pairs, false);
      a[row + 2] = ptx::e4m3_pair_to_half2(pairs, true);
    }
  }
};

template <>
struct Operand<weights::float8_e4m3fn, __nv_bfloat16, true> {
  using Tables = NoTables;
  static constexpr float UNIT = 1329227995784915872903807060280344576.f;  // 2^120
  static constexpr float SCALED_UNIT = 512.f;                             // 2^9
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  const uint32_t*, int, const Tables&) {
#pragma unroll
    for (int row = 0; row < 2; row++) e4m3_over_2_120(a[row], a[row + 2], words[row]);
  }
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
    constexpr float k2To111 = 2596148429267413814265248164610048.f;
    RowScales<__nv_bfloat16>(scales[j], k2To111).apply(a);
  }
};

constexpr uint32_t kMagnitudes = 0x77777777, kByteSigns = 0x80808080, kUpperBytes = 0xff00ff00;

// Magnitudes 0, .5, 1, 1.5 | 2, 3, 4, 6: upper bytes, and lower ones in bf16. zero: 0, but neither
// known to the compiler nor, as far as it knows, the same in all lanes: a constant combined with it
// stays in a register, where the compiler would rather fetch it again for every use.
template <class Scalar>
struct Float4Tables {
  uint32_t upper[2], lower[2];
  __device__ __forceinline__ explicit Float4Tables(uint32_t zero) {
    constexpr bool kHalf = kIsSame<Scalar, __half>;
    upper[0] = (kHalf ? 0x3e3c3800 : 0x3f3f3f00) ^ zero;
    upper[1] = (kHalf ? 0x46444240 : 0x40404040) ^ zero;
    lower[0] = 0xc0800000 ^ zero;
    lower[1] = 0xc0804000 ^ zero;
  }
};

template <class Scalar>
__device__ __forceinline__ void float4_values(uint32_t (&a)[4], uint32_t word,
                                              const Float4Tables<Scalar>& tables) {
  const uint32_t magnitudes = word & kMagnitudes;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const uint32_t selector = r == 0 ? magnitudes : magnitudes >> 16;
    const uint32_t signs = r == 0 ? word : word << 4;
    const uint32_t magnitude =
        ptx::permute_bytes(tables.upper[0], tables.upper[1], selector);
    const uint32_t upper = ptx::and_or(signs, kByteSigns, magnitude);
    if constexpr (kIsSame<Scalar, __half>) {
      a[2 * r] = ptx::permute_bytes(upper, 0, 0x2404);
      a[2 * r + 1] = upper & kUpperBytes;
    } else {
      const uint32_t lower = ptx::permute_bytes(tables.lower[0], tables.lower[1], selector);
      a[2 * r] = ptx::permute_bytes(lower, upper, 0x6240);
      a[2 * r + 1] = ptx::permute_bytes(lower, upper, 0x7351);
    }
  }
}

template <class Scalar, bool SCALED>
struct Operand<weights::nvfp4, Scalar, SCALED> {
  using Tables = Float4Tables<Scalar>;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int, const Tables& tables) {
    float4_values<Scalar>(a, words[0], tables);
  }
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int) {
    if constexpr (kIsSame<Scalar, __half>) {
      scale_rows<Scalar>(a, ptx::e4m3_pair_to_half2(scales[0], false));
    } else {
      const float2 s = ScalePair<weights::nvfp4>::get(scales, 0);
      const __nv_bfloat162 pair = __floats2bfloat162_rn(s.x, s.y);
      scale_rows<Scalar>(a, *reinterpret_cast<const uint32_t*>(&pair));
    }
  }
};

template <bool SCALED>
struct Operand<weights::mxfp4, __nv_bfloat16, SCALED> {
  using Tables = Float4Tables<__nv_bfloat16>;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int, const Tables& tables) {
    float4_values<__nv_bfloat16>(a, words[0], tables);
  }
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int) {
    const uint32_t pair = ptx::permute_bytes(scales[0], 0, 0x1404) >> 1 & 0x7f807f80;
    scale_rows<__nv_bfloat16>(a, pair);
  }
};

}  // namespace dequant
