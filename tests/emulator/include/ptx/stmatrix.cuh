// Emulated csrc/ptx/stmatrix.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

// Lanes 0..15 address the rows of two 8 x 8 matrices; transposed: lane l holds elements 2 * (l % 4)
// and + 1 of column l / 4.
inline void stmatrix_x2_transposed(void* row, uint32_t m0, uint32_t m1) {
  emu::collective(
      [&](emu::Warp& w, int s) {
        w.address[s][emu::lane()] = row;
        w.in[s][emu::lane()][0] = m0;
        w.in[s][emu::lane()][1] = m1;
        if (emu::lane() < 16) {
          emu::check_shared(row, 16);
          emu::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "stmatrix: row alignment");
        }
      },
      [](emu::Warp& w, int s) {
        if (!emu::S.violation.empty()) return;
        for (int m = 0; m < 2; m++)
          for (int l = 0; l < emu::kWarp; l++)
            for (int h = 0; h < 2; h++) {
              const uint16_t element = w.in[s][l][m] >> (16 * h);
              void* row_of = const_cast<void*>(w.address[s][m * 8 + l % 4 * 2 + h]);
              char* target = static_cast<char*>(row_of);
              memcpy(target + l / 4 * 2, &element, 2);
            }
      });
}

}  // namespace ptx
