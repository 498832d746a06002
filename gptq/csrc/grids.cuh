// The points of a grid, which zeros are subtracted from and scales multiply (gptq/grid.py): codes
// of integer types, numbers of floating-point types, or any number where nothing is rounded.
#pragma once

#include "rounding.cuh"

namespace gptq {

enum Grid { kIntegers, kE4M3, kE2M1, kReals };

// `Stored` holds a point in memory, `Scale` every scale of the grid's types without rounding it
// (zero points have fp16 values in all types, as integers or as fractions). `nearest` is the point
// nearest to value / scale (+ zero); reciprocal: the rounded 1 / scale; top: the last code of an
// integer type.
template <int GRID>
struct Points;

template <>
struct Points<kIntegers> {
  using Stored = uint8_t;
  using Scale = __half;
  static __device__ __forceinline__ float nearest(float value, float scale, float reciprocal,
                                                  float zero, float top) {
    return code_of(value, scale, reciprocal, zero, top);
  }
};

// Ties to even, saturating, zeros with the value's sign (which nearest_integer would lose); the
// numbers of one binade are MANTISSA bits apart, those below the smallest normal number as far as
// just above it.
template <int EXPONENT, int MANTISSA>
struct FloatPoints {
  using Stored = float;
  static constexpr int kBias = 127;   // of float32
  static constexpr int kFraction = 23;  // bits of float32's mantissa
  static constexpr int kLowest = 2 - (1 << (EXPONENT - 1));  // exponent of the smallest normal
  // 448 for e4m3, whose last pattern is NaN; 6 for e2m1
  static constexpr float kTop = EXPONENT == 4 ? 1.75f : 2.0f - 1.0f / (1 << MANTISSA);
  static constexpr float kLargest = kTop * (1 << (1 << (EXPONENT - 1)));

  static __device__ __forceinline__ float nearest(float value, float scale, float reciprocal, float,
                                                  float) {
    const float quotient = quotient_of(value, scale, reciprocal);
    const int biased = static_cast<int>(__float_as_uint(quotient) >> kFraction & 0xff);
    const int exponent = max(biased, kLowest + kBias) - MANTISSA;  // of a step, biased
    const float step = __uint_as_float(static_cast<unsigned>(exponent) << kFraction);
    const float inverse = __uint_as_float(static_cast<unsigned>(2 * kBias - exponent) << kFraction);
    return fminf(fmaxf(rintf(quotient * inverse) * step, -kLargest), kLargest);
  }
};

template <>
struct Points<kE4M3> : FloatPoints<4, 3> {
  using Scale = __half;
};

template <>
struct Points<kE2M1> : FloatPoints<2, 1> {
  using Scale = float;  // powers of two, or e4m3 with a common factor: beyond the range of fp16
};

template <>
struct Points<kReals> {
  using Stored = float;
  using Scale = __half;  // not used
};

}  // namespace gptq
