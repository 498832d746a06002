// Scales of groups on the registers of an A operand, for the three formats of scales.
//
// HalfScales (fp16): dequant/int4.cuh, RowScales. The other two serve 4-bit floats, whose products
// with their scales are exact: 2 significant bits times 4 (e4m3), or times a power of two.
//
// A scale byte goes to the high byte of both halves of a register (prmt), then its exponent to where
// the 16-bit type has its own. With s the scale:
//   e4m3 -> fp16  sign | seven bits >> 1        s * 2^-8,   then * 2^15:  s * 2^7 (at most 57344)
//   e4m3 -> bf16  sign | seven bits >> 4        s * 2^-120, then * 2^119 twice: s * 2^118
//   e8m0 -> bf16  eight bits >> 1               s
#pragma once

#include "dequant/dequantizer.cuh"
#include "dequant/int4.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

template <class Scalar>
struct HalfScales {
  static __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t* scales, int j) {
    RowScales<Scalar>(scales[j]).apply(a);
  }
};

// The byte `index` of eight in the upper byte of both halves.
__device__ __forceinline__ uint32_t spread_byte(const uint32_t* bytes, int index) {
  return ptx::permute_bytes(bytes[index / 4], 0, 0x0404 | (index % 4) << 4 | (index % 4) << 12);
}

template <class Scalar>
struct E4m3Scales;

template <>
struct E4m3Scales<__half> {
  static constexpr float SCALE_UNIT = 1.f / 128;  // a scale is SCALE_UNIT * its register value
  static __device__ __forceinline__ uint32_t row(const uint32_t* scales, int index) {
    const uint32_t byte = spread_byte(scales, index);
    const uint32_t value = ptx::and_or(byte >> 1, 0x3f803f80, byte & 0x80008000);
    return ptx::mul2(value, 0x78007800, __half());  // 2^15
  }
};

template <>
struct E4m3Scales<__nv_bfloat16> {
  static constexpr float SCALE_UNIT = 1.f / 332306998946228968225951765070086144.f;  // 2^-118
  static __device__ __forceinline__ uint32_t row(const uint32_t* scales, int index) {
    const uint32_t byte = spread_byte(scales, index);
    const uint32_t value = ptx::and_or(byte >> 4, 0x07f007f0, byte & 0x80008000);
    const uint32_t large = ptx::mul2(value, 0x7b007b00, __nv_bfloat16());  // 2^119
    return ptx::mul2(large, 0x7b007b00, __nv_bfloat16());
  }
};

template <class Scalar>
struct E8m0Scales;

template <>
struct E8m0Scales<__nv_bfloat16> {
  static constexpr float SCALE_UNIT = 1.f;
  static __device__ __forceinline__ uint32_t row(const uint32_t* scales, int index) {
    return spread_byte(scales, index) >> 1 & 0x7f807f80;
  }
};

}  // namespace dequant
