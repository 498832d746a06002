// The interface of dequantization: one specialisation per weight type and 16-bit compute type.
//
// A lane holds, of 16 features (rows g and g + 8, g = lane / 4) and 16 k, eight codes in WORDS words
// (FORMAT.md draws them), and makes of them the four registers of an A operand (ptx/mma.cuh):
//     a[0], a[2]: row g, k 2t, 2t+1 and k + 8;    a[1], a[3]: row g + 8
//
//   Dequantizer<Weight, Scalar>::WORDS                words of a fragment
//   Dequantizer<Weight, Scalar>::UNIT                 a weight is UNIT * its register value * scale
//   Dequantizer<Weight, Scalar>::fragment(a, w, z, j) codes minus zero points: exact, or (HQQ)
//                                                     rounded once
//   Dequantizer<Weight, Scalar>::apply(a, s, j)       a *= scales; UNIT becomes SCALED_UNIT
//
// z: zero points of the lane's eight features (tile j has rows 16 j + g and 16 j + 8 + g); s: their
// scales. Both as they lie in shared memory, Registers<Weight> of them.
#pragma once

#include "common/types.cuh"
#include "common/weight_types.cuh"

namespace dequant {

// Zero points and scales of a lane's eight features in one group.
template <class Weight>
struct GroupRegisters {
  static constexpr int SCALE_WORDS = kScaleBytes<Weight> / 4;
  static constexpr int ZERO_WORDS = kZeroBytes<Weight> / 4;
  uint32_t scales[SCALE_WORDS];
  uint32_t zeros[ZERO_WORDS > 0 ? ZERO_WORDS : 1];

  // `row`: the lanes' entries of this group; `lane_group`: which of them is this lane's.
  __device__ __forceinline__ void load_scales(const void* row, int lane_group) {
    load<SCALE_WORDS>(scales, row, lane_group);
  }
  __device__ __forceinline__ void load_zeros(const void* row, int lane_group) {
    if constexpr (ZERO_WORDS > 0) load<ZERO_WORDS>(zeros, row, lane_group);
  }

 private:
  template <int Count>
  static __device__ __forceinline__ void load(uint32_t* to, const void* row, int lane_group) {
    if constexpr (Count == 4) {
      const uint4 v = static_cast<const uint4*>(row)[lane_group];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (Count == 2) {
      const uint2 v = static_cast<const uint2*>(row)[lane_group];
      to[0] = v.x, to[1] = v.y;
    } else {
      to[0] = static_cast<const uint32_t*>(row)[lane_group];
    }
  }
};

template <class Weight, class Scalar>
struct Dequantizer;

}  // namespace dequant
