// Output rows from shared to global memory.
#pragma once

#include "common/types.cuh"

namespace common {

// Write a tile of COLUMNS features x ROWS tokens, which lies transposed in shared memory, to out
// [m, n] at (token, first): 16 bytes at a time where alignment allows. `THREADS` threads take part;
// `thread` is the number of this one.
template <int COLUMNS, int THREADS, class Scalar, int ROWS, int PITCH>
__device__ __forceinline__ void copy_rows(const Scalar (&tile)[ROWS][PITCH], Scalar* out, int m,
                                          int n, int token, int first, int thread) {
  constexpr int kChunk = 8;
  constexpr int kChunks = COLUMNS / kChunk;  // of a row
  static_assert(PITCH % kChunk == 0, "rows start on 16 bytes");
  const int tokens = min(ROWS, m - token);
  const bool aligned = (reinterpret_cast<unsigned long long>(out) | n * sizeof(Scalar)) % 16 == 0;
  for (int item = thread; item < tokens * kChunks; item += THREADS) {
    const int row = item / kChunks;
    const int at = item % kChunks * kChunk;
    const int column = first + at;
    Scalar* target = out + static_cast<long long>(token + row) * n + column;
    if (aligned && column + kChunk <= n) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&tile[row][at]);
    } else {
      for (int i = 0; i < kChunk; ++i)
        if (column + i < n) target[i] = tile[row][at + i];
    }
  }
}

}  // namespace common
