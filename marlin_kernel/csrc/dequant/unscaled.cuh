// Codes to fragments whose products are added up before the scales of their group apply, and those
// scales as fp32: every type's dequantizer, in a unit that leaves sums within the range of fp32.
//
//   Unscaled<Weight, Scalar>::fragment, UNIT   as Dequantizer's
//   ScalePair<Weight>::get(pair)               scales of rows g and g + 8, which `pair` holds side by
//                                              side in its lowest bits; a scale is UNIT times that
#pragma once

#include "dequant/dequantizer.cuh"
#include "dequant/float4.cuh"
#include "dequant/float8.cuh"
#include "dequant/integer4.cuh"
#include "dequant/integer8.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

template <class Weight, class Scalar>
struct Unscaled : Dequantizer<Weight, Scalar> {};

// The dequantizer leaves 2^-126 of a value to its product with the scale: too little for sums.
template <>
struct Unscaled<weights::nvfp4, __nv_bfloat16> {
  static constexpr float UNIT = 1.f;
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  const uint32_t*, int) {
    float4_to_fragment<__nv_bfloat16>(a, words[0]);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::mul2(a[i], 0x7e807e80, __nv_bfloat16());  // 2^126
  }
};

template <class Weight, Scales FORMAT = Weight::SCALES>
struct ScalePair;

template <class Weight>
struct ScalePair<Weight, Scales::HALF> {
  static constexpr float UNIT = 1.f;
  static __device__ __forceinline__ float2 get(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
};

// Each byte in the upper half of 16 bits, its exponent moved to that of fp16: 2^-8 of its value.
template <class Weight>
struct ScalePair<Weight, Scales::E4M3> {
  static constexpr float UNIT = 256.f;
  static __device__ __forceinline__ float2 get(uint32_t pair) {
    const uint32_t bytes = ptx::permute_bytes(pair, 0, 0x1404);
    const uint32_t value = ptx::and_or(bytes >> 1, 0x3f803f80, bytes & 0x80008000);
    return __half22float2(*reinterpret_cast<const __half2*>(&value));
  }
};

template <class Weight>
struct ScalePair<Weight, Scales::E8M0> {
  static constexpr float UNIT = 1.f;
  static __device__ __forceinline__ float2 get(uint32_t pair) {
    return make_float2(__uint_as_float((pair & 0xff) << 23), __uint_as_float((pair & 0xff00) << 15));
  }
};

}  // namespace dequant
