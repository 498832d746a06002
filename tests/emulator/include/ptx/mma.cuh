// Emulated csrc/ptx/mma.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline float emulated_element(uint32_t pair, int half, __half) {
  return emu::half_bits_to_float(half ? pair >> 16 : pair & 0xffff);
}
inline float emulated_element(uint32_t pair, int half, __nv_bfloat16) {
  return emu::bf16_bits_to_float(half ? pair >> 16 : pair & 0xffff);
}

template <class Scalar>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Scalar type) {
  const int slot = emu::collective(
      [&](emu::Warp& w, int s) {
        uint32_t* in = w.in[s][emu::lane()];
        memcpy(in, a, 16);
        memcpy(in + 4, b, 8);
        memcpy(in + 6, c, 16);
      },
      [&](emu::Warp& w, int s) {
        float A[16][16], B[16][8];
        for (int l = 0; l < emu::kWarp; l++) {
          const int g = l / 4, t = l % 4;
          const uint32_t* in = w.in[s][l];
          for (int h = 0; h < 2; h++) {
            for (int r = 0; r < 4; r++)
              A[g + r % 2 * 8][2 * t + r / 2 * 8 + h] = emulated_element(in[r], h, type);
            for (int r = 0; r < 2; r++)
              B[2 * t + r * 8 + h][g] = emulated_element(in[4 + r], h, type);
          }
        }
        float C[16][8] = {};
        for (int i = 0; i < 16; i++)
          for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
        for (int l = 0; l < emu::kWarp; l++) {
          float* out = reinterpret_cast<float*>(w.out[s][l]);
          memcpy(out, &w.in[s][l][6], 16);
          for (int i = 0; i < 4; i++) out[i] += C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        }
      });
  memcpy(c, emu::warp().out[slot][emu::lane()], 16);
}

}  // namespace ptx
