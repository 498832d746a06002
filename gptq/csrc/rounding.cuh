// How a weight becomes a code, and a scale the fp16 value that is stored: the arithmetic of
// gptq/grid.py and marlin_kernel/reference.py, operation by operation.
#pragma once

#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/shared_memory.cuh"

namespace gptq {

constexpr float kLargestHalf = 65504.0f;
constexpr float kMinScale = 1.0f / (1 << 24);  // smallest positive fp16, 2**-24

// The correctly rounded value / scale. `reciprocal` is the rounded 1 / scale; with it two fused
// steps suffice (Markstein), at a third of a division's price.
__device__ __forceinline__ float quotient_of(float value, float scale, float reciprocal) {
  const float quotient = value * reciprocal;
  return fmaf(fmaf(-quotient, scale, value), reciprocal, quotient);
}

// Adding and subtracting 1.5 * 2**23, whose neighbours are 1 apart, rounds to the nearest integer,
// ties to even, whatever is below 2**22; what is beyond stays beyond any code. Two additions are
// shorter in a chain of inputs than the conversion unit's rounding, and that unit is narrow.
__device__ __forceinline__ float nearest_integer(float v) {
  constexpr float kUnits = 12582912.0f;
  return (v + kUnits) - kUnits;
}

// clamp(round(value / scale + zero), 0, top).
__device__ __forceinline__ float code_of(float value, float scale, float reciprocal, float zero,
                                         float top) {
  const float quotient = quotient_of(value, scale, reciprocal);
  return fminf(fmaxf(nearest_integer(quotient + zero), 0.0f), top);
}

// The value of a point (grids.cuh). Exact unless zeros are fractions: at most 8 bits times the 11
// of an fp16 scale.
__device__ __forceinline__ float value_of(float point, float scale, float zero) {
  return (point - zero) * scale;
}

// A scale as fp16 will hold it: never zero, never infinite, sign kept.
__device__ __forceinline__ float stored_scale(float scale) {
  const float clamped = fminf(fmaxf(scale, -kLargestHalf), kLargestHalf);
  const float stored = __half2float(__float2half_rn(clamped));
  return fabsf(stored) < kMinScale ? copysignf(kMinScale, stored) : stored;
}

}  // namespace gptq
