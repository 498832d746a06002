// 4-bit integer codes to fp16 or bf16 without removing their bias or zero point: fewer instructions
// per word than dequant/int4.cuh. It is removed by one more product, which all rows of a group of k
// share:
//
//     sum (code - 8) a     =  sum (code + offset) a  +  sum (-8 - offset) a
//     sum (code - zero) a  =  sum (code + offset) a  -  (zero + offset) sum a
//
// Two k steps of 16 (two words) are taken together. They give two parts, each an A and a B operand:
//
// fp16: the codes themselves, as subnormals. A code in bits 0-3 of a half is code * 2^-24, in bits
//   4-7 code * 2^-20; tensor cores multiply subnormals exactly. Part 0 takes the nibbles at bits
//   0-3 of both words, part 1 those at bits 4-7: parts differ in the unit, so their sums stay apart
//   until the scale is applied. Each part multiplies one half (8 of 16) of both steps' k: B fragment
//   registers b0, b0' or b1, b1'.
// bf16: 128 + code (0x4300 has its unit at bit 0), as in int4.cuh; a part is one step. The range of
//   fp32 has no room for subnormals of bf16. What fp32 rounds off sums of 136 a, 2^-24 of them, is
//   far below the rounding of a bf16 result.
#pragma once

#include "common/types.cuh"
#include "common/weight_types.cuh"
#include "dequant/dequantizer.cuh"
#include "dequant/int4.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

template <class Scalar>
struct BiasedPair;

template <>
struct BiasedPair<__half> {
  static constexpr int kUnits = 2;              // units that sums come in
  static constexpr float kUnit = 16777216.f;    // 2^24: true value of a sum in the first unit
  static constexpr float kSecond = 1.f / 16.f;  // the second unit, in terms of the first

  // A operand of part 0 or 1 of the words of two steps.
  static __device__ __forceinline__ void codes(uint32_t (&a)[4], int part, uint32_t word,
                                               uint32_t next) {
    const uint32_t mask = part == 0 ? kLowNibbles : kHighNibbles;
    a[0] = word & mask;
    a[1] = (word >> 8) & mask;
    a[2] = next & mask;
    a[3] = (next >> 8) & mask;
  }
  static constexpr float kOffset = 0.f;                     // that codes come with
  static constexpr uint32_t kOffsetMinus1024 = 0xe400e400;  // in fp16
  // -8 in the unit of the part; and 1.
  static __device__ __forceinline__ uint32_t bias(int part) {
    return part == 0 ? 0x80088008u : 0x80808080u;
  }
  static __device__ __forceinline__ uint32_t one(int part) {
    return part == 0 ? 0x00010001u : 0x00100010u;
  }
  static __device__ __forceinline__ int unit(int part) { return part; }
  // Which 8 of the 32 k are the i-th B register: registers 2 * part and 2 * part + 1 belong to a
  // part.
  static __device__ __forceinline__ int chunk(int i) { return i % 2 * 2 + i / 2; }
};

template <>
struct BiasedPair<__nv_bfloat16> {
  static constexpr int kUnits = 1;
  static constexpr float kUnit = 1.f;
  static constexpr float kSecond = 0.f;

  static __device__ __forceinline__ void codes(uint32_t (&a)[4], int part, uint32_t word,
                                               uint32_t next) {
    constexpr int kRegisterOfShift[4] = {0, 2, 1, 3};
    const uint32_t mine = part == 0 ? word : next;
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[kRegisterOfShift[i]] = ptx::and_or(mine >> (4 * i), kLowNibbles, kBf16_128);
  }
  static constexpr float kOffset = 128.f;
  static constexpr uint32_t kOffsetMinus1024 = 0xe300e300;
  static __device__ __forceinline__ uint32_t bias(int) { return kBf16Minus136; }
  static __device__ __forceinline__ uint32_t one(int) { return 0x3f803f80; }
  static __device__ __forceinline__ int unit(int) { return 0; }
  static __device__ __forceinline__ int chunk(int i) { return i; }
};

// Which types these are.
template <class Weight>
constexpr bool kIsBiased4 =
    kIsSame<Weight, weights::uint4b8> || (Weight::BITS == 4 && Weight::ZEROS != Zeros::NONE);

// Zero points of rows g and g + 8 of 16-row tile m, plus the offset of the codes.
template <class Scalar>
__device__ __forceinline__ float2 zero_pair(const GroupRegisters<weights::uint4>& group, int m) {
  const uint32_t above = ptx::and_or(group.zeros[0] >> (4 * m), kLowNibbles, kHalf1024);
  const uint32_t z = ptx::add2(above, BiasedPair<Scalar>::kOffsetMinus1024, __half());
  return __half22float2(*reinterpret_cast<const __half2*>(&z));
}
template <class Scalar>
__device__ __forceinline__ float2 zero_pair(const GroupRegisters<weights::uint4_hqq>& group,
                                            int m) {
  const float2 z = __half22float2(*reinterpret_cast<const __half2*>(&group.zeros[m]));
  constexpr float kOffset = BiasedPair<Scalar>::kOffset;
  if constexpr (kOffset == 0.f) return z;
  return make_float2(z.x + kOffset, z.y + kOffset);
}

}  // namespace dequant
