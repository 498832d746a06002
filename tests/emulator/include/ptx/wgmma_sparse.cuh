// Emulated csrc/ptx/wgmma_sparse.cuh. A and metadata are read when the instruction is issued, B and
// the accumulators when it executes.
#pragma once

#include <array>
#include <map>
#include <utility>

#include "common/types.cuh"
#include "ptx/wgmma.cuh"

namespace ptx {

constexpr uint64_t kWgmmaStepK32 = 64 >> 4;

// Metadata of the operations under way, by warpgroup and number of the operation.
inline std::map<std::pair<const void*, unsigned>, std::array<uint32_t, 128>> metadata_under_way;

template <int N, class Scalar>
struct SparseWgmma {
  template <int SELECTOR>
  static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, uint32_t metadata) {
    const char* shared = emu::S.fiber->block->shared;
    emu::check_shared(shared + (b << 4), N / 8 * 1024 - 64);
    const std::pair<const void*, unsigned> key = {&emu::warpgroup(), emu::S.fiber->issued};
    metadata_under_way[key][emu::S.fiber->thread.x % 128] = metadata;
    emu::issue(d, a, [=](emu::GroupOperation& op) {
      execute(op, shared, b, metadata_under_way[key], SELECTOR);
      metadata_under_way.erase(key);
    });
  }

 private:
  static void execute(emu::GroupOperation& op, const char* shared, uint64_t b,
                      const std::array<uint32_t, 128>& metadata, int selector) {
    static float A[64][16], B[32][N], D[64][N];
    const Scalar type = Scalar();
    for (int n = 0; n < N; n++)
      for (int k = 0; k < 32; k++) B[k][n] = emulated_operand(shared, b, n, k, type);
    for (int thread = 0; thread < 128; thread++) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (int r = 0; r < 4; r++)
        for (int h = 0; h < 2; h++)
          A[row + r % 2 * 8][2 * t + r / 2 * 8 + h] =
              emulated_element(op.fragments[thread][r], h, type);
    }
    memset(D, 0, sizeof(D));
    for (int row = 0; row < 64; row++)
      for (int kept = 0; kept < 16; kept++) {
        const int group = kept / 2;  // of eight groups of four k
        const int lane = row % 8 * 4 + 2 * selector + group / 4;
        const uint32_t word = metadata[row / 16 * 32 + lane] >> (16 * (row / 8 % 2));
        const int k = 4 * group + (word >> (4 * (group % 4) + 2 * (kept % 2)) & 3);
        for (int n = 0; n < N; n++) D[row][n] += A[row][kept] * B[k][n];
      }
    for (int thread = 0; thread < 128; thread++) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (int j = 0; j < N / 8; j++)
        for (int i = 0; i < 4; i++)
          op.accumulators[thread][4 * j + i] += D[row + i / 2 * 8][8 * j + 2 * t + i % 2];
    }
  }
};

}  // namespace ptx
