// Emulated csrc/ptx/bit_ops.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t pick = selector >> (4 * i) & 0xf;
    uint32_t byte = bytes >> (8 * (pick & 7)) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;  // sign mode
    d |= byte << (8 * i);
  }
  return d;
}

inline uint32_t dot_16x8(uint32_t a, uint32_t b, uint32_t c) {
  return c + (a & 0xffff) * (b & 0xff) + (a >> 16) * (b >> 8 & 0xff);
}

// One rounding each: the exact result fits a double for fp16, and is as good as exact for bf16.
template <class F>
inline uint32_t emulated_pair(F f, __half) {
  return emu::float_to_half_bits(f(0)) | uint32_t(emu::float_to_half_bits(f(16))) << 16;
}
template <class F>
inline uint32_t emulated_pair(F f, __nv_bfloat16) {
  return emu::float_to_bf16_bits(f(0)) | uint32_t(emu::float_to_bf16_bits(f(16))) << 16;
}
inline double emulated_value(uint32_t pair, int shift, __half) {
  return emu::half_bits_to_float(pair >> shift & 0xffff);
}
inline double emulated_value(uint32_t pair, int shift, __nv_bfloat16) {
  return emu::bf16_bits_to_float(pair >> shift & 0xffff);
}
template <class Scalar>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, Scalar t) {
  return emulated_pair(
      [=](int s) {
        return emulated_value(a, s, t) * emulated_value(b, s, t) + emulated_value(c, s, t);
      },
      t);
}
template <class Scalar>
inline uint32_t add2(uint32_t a, uint32_t b, Scalar t) {
  return emulated_pair([=](int s) { return emulated_value(a, s, t) + emulated_value(b, s, t); }, t);
}
template <class Scalar>
inline uint32_t mul2(uint32_t a, uint32_t b, Scalar t) {
  return emulated_pair([=](int s) { return emulated_value(a, s, t) * emulated_value(b, s, t); }, t);
}

}  // namespace ptx
