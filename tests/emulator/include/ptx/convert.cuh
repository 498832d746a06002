// Emulated csrc/ptx/convert.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline uint32_t pack_bytes(const float (&v)[4], int8_t) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const float r = nearbyintf(v[i]);
    word |= (static_cast<int>(r < -128 ? -128 : r > 127 ? 127 : r) & 0xff) << (8 * i);
  }
  return word;
}

// The nearest of all 127 magnitudes; of two equally near ones that with the even code.
inline uint32_t pack_bytes(const float (&v)[4], float8_e4m3) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    int best = 0;
    float nearest = INFINITY;
    for (int code = 0; code < 127; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      const float value =
          exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, exponent - 10);
      const float distance = fabsf(fabsf(v[i]) - value);
      if (distance < nearest || (distance == nearest && code % 2 == 0)) best = code, nearest = distance;
    }
    word |= static_cast<uint32_t>(best | (signbit(v[i]) ? 0x80 : 0)) << (8 * i);
  }
  return word;
}

inline uint32_t e4m3_pair_to_half2(uint32_t bytes, bool high) {
  uint32_t pair = 0;
  if (high) bytes >>= 16;
  for (int i = 0; i < 2; ++i) {
    const int code = bytes >> (8 * i) & 0x7f, exponent = code >> 3, mantissa = code & 7;
    const float value =
        exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, exponent - 10);
    uint32_t half = emu::float_to_half_bits(code == 0x7f ? NAN : value) & 0x7fff;
    half |= (bytes >> (8 * i + 7) & 1) << 15;
    pair |= half << (16 * i);
  }
  return pair;
}

}  // namespace ptx
