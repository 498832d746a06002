// Emulated csrc/ptx/mma_sp.cuh.
#pragma once

#include "common/types.cuh"
#include "ptx/mma.cuh"

namespace ptx {

template <int SELECTOR, class Scalar>
inline void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                            uint32_t metadata, Scalar type) {
  const int slot = emu::collective(
      [&](emu::Warp& w, int s) {
        uint32_t* in = w.in[s][emu::lane()];
        memcpy(in, a, 16);
        memcpy(in + 4, b, 16);
        in[8] = metadata;
      },
      [&](emu::Warp& w, int s) {
        float A[16][16], B[32][8], C[16][8] = {};
        for (int l = 0; l < emu::kWarp; l++) {
          const int g = l / 4, t = l % 4;
          const uint32_t* in = w.in[s][l];
          for (int h = 0; h < 2; h++)
            for (int r = 0; r < 4; r++) {
              A[g + r % 2 * 8][2 * t + r / 2 * 8 + h] = emulated_element(in[r], h, type);
              B[8 * r + 2 * t + h][g] = emulated_element(in[4 + r], h, type);
            }
        }
        for (int row = 0; row < 16; row++)
          for (int kept = 0; kept < 16; kept++) {
            const int group = kept / 2;  // of eight groups of four k
            const int lane = row % 8 * 4 + 2 * SELECTOR + group / 4;
            const uint32_t word = w.in[s][lane][8] >> (16 * (row / 8));
            const int k = 4 * group + (word >> (4 * (group % 4) + 2 * (kept % 2)) & 3);
            for (int n = 0; n < 8; n++) C[row][n] += A[row][kept] * B[k][n];
          }
        for (int l = 0; l < emu::kWarp; l++)
          for (int i = 0; i < 4; i++)
            reinterpret_cast<float*>(w.out[s][l])[i] = C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
      });
  float sums[4];
  memcpy(sums, emu::warp().out[slot][emu::lane()], 16);
  for (int i = 0; i < 4; i++) c[i] += sums[i];
}

}  // namespace ptx
