// Emulated csrc/ptx/mma_8bit.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline float emulated_byte(uint32_t word, int byte, int8_t) {
  return static_cast<int8_t>(word >> (8 * byte) & 0xff);
}
inline float emulated_byte(uint32_t word, int byte, float8_e4m3) {
  const uint32_t bits = word >> (8 * byte) & 0xff;
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float magnitude =
      exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

// Sums of 32 products of int8 are exact in fp32 too.
template <class Sum, class Element>
inline void mma_m16n8k32(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Element type) {
  const int slot = emu::collective(
      [&](emu::Warp& w, int s) {
        uint32_t* in = w.in[s][emu::lane()];
        memcpy(in, a, 16);
        memcpy(in + 4, b, 8);
        memcpy(in + 6, c, 16);
      },
      [&](emu::Warp& w, int s) {
        float A[16][32], B[32][8];
        for (int l = 0; l < emu::kWarp; l++) {
          const int g = l / 4, t = l % 4;
          const uint32_t* in = w.in[s][l];
          for (int e = 0; e < 4; e++) {
            for (int r = 0; r < 4; r++)
              A[g + r % 2 * 8][4 * t + r / 2 * 16 + e] = emulated_byte(in[r], e, type);
            for (int r = 0; r < 2; r++) B[4 * t + r * 16 + e][g] = emulated_byte(in[4 + r], e, type);
          }
        }
        float C[16][8] = {};
        for (int i = 0; i < 16; i++)
          for (int k = 0; k < 32; k++)
            for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
        for (int l = 0; l < emu::kWarp; l++) {
          Sum* out = reinterpret_cast<Sum*>(w.out[s][l]);
          memcpy(out, &w.in[s][l][6], 16);
          for (int i = 0; i < 4; i++)
            out[i] += static_cast<Sum>(C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
        }
      });
  memcpy(c, emu::warp().out[slot][emu::lane()], 16);
}

}  // namespace ptx
