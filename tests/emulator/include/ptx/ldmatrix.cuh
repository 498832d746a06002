// Emulated csrc/ptx/ldmatrix.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

template <int Matrices>
inline void emulated_ldmatrix(uint32_t* r, const void* row) {
  const int slot = emu::collective(
      [&](emu::Warp& w, int s) {
        if (emu::lane() < 8 * Matrices) {
          emu::check_shared(row, 16);
          emu::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix: row alignment");
        }
        w.address[s][emu::lane()] = row;
      },
      [](emu::Warp& w, int s) {
        if (!emu::S.violation.empty()) return;
        for (int m = 0; m < Matrices; m++)
          for (int l = 0; l < emu::kWarp; l++)
            memcpy(&w.out[s][l][m],
                   static_cast<const char*>(w.address[s][m * 8 + l / 4]) + l % 4 * 4, 4);
      });
  memcpy(r, emu::warp().out[slot][emu::lane()], 4 * Matrices);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulated_ldmatrix<2>(r, row); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<4>(r, row); }

}  // namespace ptx
