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
// the nibbles of a selector. In fp16 a magnitude is its upper byte alone. In bf16 the lower one is
// enough for w * 2^-128: 32 w units of the smallest subnormal (192 and 128 lie above the subnormals,
// where the unit is still the same). The selectors are the magnitudes themselves; signs lie in bit 3
// of the nibbles, where a mask finds those of four results in place. So, of the eight codes of a lane
// (sm90_layout.arrange_floats):
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
constexpr uint32_t kBf16_2To118 = 0x7a807a80;

// Magnitudes 0, .5, 1, 1.5 | 2, 3, 4, 6 as bytes. zero: 0, but neither known to the compiler nor, as
// far as it knows, the same in all lanes: a constant combined with it stays in a register, where the
// compiler would rather fetch it again for every use.
template <class Scalar>
struct Float4Tables {
  uint32_t bytes[2];
  __device__ __forceinline__ explicit Float4Tables(uint32_t zero) {
    constexpr bool kHalf = kIsSame<Scalar, __half>;
    bytes[0] = (kHalf ? 0x3e3c3800 : 0x30201000) ^ zero;
    bytes[1] = (kHalf ? 0x46444240 : 0xc0806040) ^ zero;
  }
};

// In fp16 the weights, in bf16 2^-128 times the weights.
template <class Scalar>
__device__ __forceinline__ void float4_values(uint32_t (&a)[4], uint32_t word,
                                              const Float4Tables<Scalar>& tables) {
  const uint32_t magnitudes = word & kMagnitudes;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const uint32_t selector = r == 0 ? magnitudes : magnitudes >> 16;
    const uint32_t signs = r == 0 ? word : word << 4;
    const uint32_t bytes = ptx::permute_bytes(tables.bytes[0], tables.bytes[1], selector);
    if constexpr (kIsSame<Scalar, __half>) {
      const uint32_t upper = ptx::and_or(signs, kByteSigns, bytes);
      a[2 * r] = ptx::permute_bytes(upper, 0, 0x2404);
      a[2 * r + 1] = upper & kUpperBytes;
    } else {
      const uint32_t upper = signs & kByteSigns;
      a[2 * r] = ptx::permute_bytes(bytes, upper, 0x6240);
      a[2 * r + 1] = ptx::permute_bytes(bytes, upper, 0x7351);
    }
  }
}

template <bool SCALED>
struct Operand<weights::nvfp4, __half, SCALED> {
  using Tables = Float4Tables<__half>;
  static constexpr float UNIT = 1.f, SCALED_UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int, const Tables& tables) {
    float4_values<__half>(a, words[0], tables);
  }
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
    scale_rows<__half>(a, ptx::e4m3_pair_to_half2(scales[j / 2], j % 2 != 0));
  }
};

// Halves of the weights: 2^128 is out of range.
struct Float4HalvesBf16 {
  using Tables = Float4Tables<__nv_bfloat16>;
  static constexpr float UNIT = 2.f, SCALED_UNIT = 2.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int, const Tables& tables) {
    float4_values<__nv_bfloat16>(a, words[0], tables);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], kBf16_2To127, __nv_bfloat16());
  }
};

template <>
struct Operand<weights::nvfp4, __nv_bfloat16, false> : Float4HalvesBf16 {};

template <>
struct Operand<weights::nvfp4, __nv_bfloat16, true> {
  using Tables = Float4Tables<__nv_bfloat16>;
  static constexpr float SCALED_UNIT = 1024.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int, const Tables& tables) {
    float4_values<__nv_bfloat16>(a, words[0], tables);
  }
  // scales bring 2^118 of the 2^128 that registers lack: 448 times that is within the range
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
    const float2 s = ScalePair<weights::nvfp4>::get(scales, j);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(s.x, s.y);
    scale_rows<__nv_bfloat16>(a, ptx::mul2(*reinterpret_cast<const uint32_t*>(&pair),
                                           kBf16_2To118, __nv_bfloat16()));
  }
};

template <bool SCALED>
struct Operand<weights::mxfp4, __nv_bfloat16, SCALED> : Float4HalvesBf16 {
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int) {
    const uint32_t pair = ptx::permute_bytes(scales[0], 0, 0x1404) >> 1 & 0x7f807f80;
    scale_rows<__nv_bfloat16>(a, pair);
  }
};

// True value of the sums of a kernel.
template <class Operand, bool SCALED>
__device__ constexpr float unit_of_sums() {
  if constexpr (SCALED)
    return Operand::SCALED_UNIT;
  else
    return Operand::UNIT;
}

// ---- codes of the small-batch kernel ----
// Its tokens are in registers, so they can be multiplied (by TOKENS, a pair of powers of two, unless
// that is 0) instead of every value. 2^80 leaves bf16 activations room from 2^-54, below which sums in
// fp32 lose bits, to 2^48, above which they are infinite.
template <class Weight, class Scalar, bool SCALED>
struct SmallBatchOperand : Operand<Weight, Scalar, SCALED> {
  static constexpr uint32_t TOKENS = 0;
};

constexpr uint32_t kBf16_2To80 = 0x67806780;

struct Float4Bf16 {
  using Tables = Float4Tables<__nv_bfloat16>;
  static constexpr uint32_t TOKENS = kBf16_2To80;
  static constexpr float UNIT = 281474976710656.f;  // 2^48
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int, const Tables& tables) {
    float4_values<__nv_bfloat16>(a, words[0], tables);
  }
};
template <>
struct SmallBatchOperand<weights::nvfp4, __nv_bfloat16, false> : Float4Bf16 {};
template <>
struct SmallBatchOperand<weights::mxfp4, __nv_bfloat16, false> : Float4Bf16 {};

template <>
struct SmallBatchOperand<weights::float8_e4m3fn, __nv_bfloat16, false>
    : Operand<weights::float8_e4m3fn, __nv_bfloat16, true> {
  static constexpr uint32_t TOKENS = kBf16_2To80;
  static constexpr float UNIT = 1099511627776.f;  // 2^40
};

}  // namespace dequant
