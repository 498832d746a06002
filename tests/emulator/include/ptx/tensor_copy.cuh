// Emulated csrc/ptx/tensor_copy.cuh.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"

namespace emu {
// What the emulator puts into a TensorMap of 8-bit elements: a matrix, and the box of one copy.
struct ByteMatrix {
  const char* base;
  long long row_bytes;
  int columns, rows;          // of the matrix
  int box_columns, box_rows;  // of a copy; box_columns is the period of the swizzle: 64 or 128
};
static_assert(sizeof(ByteMatrix) <= sizeof(TensorMap), "fits");

inline void land_box(const ByteMatrix& m, char* target, const char* shared_base, int column,
                     int row) {
  for (int r = 0; r < m.box_rows; r++)
    for (int c = 0; c < m.box_columns; c++) {
      char element = 0;
      const bool inside =
          row + r >= 0 && row + r < m.rows && column + c >= 0 && column + c < m.columns;
      if (inside) element = m.base[(row + r) * m.row_bytes + column + c];
      long at = target - shared_base + r * m.box_columns + c;
      at ^= (at >> 7 & (m.box_columns / 16 - 1)) << 4;
      const_cast<char*>(shared_base)[at] = element;
    }
}

inline void start_box(void* shared, const TensorMap* map, int column, int row, uint64_t* barrier,
                      unsigned blocks) {
  ByteMatrix m;
  memcpy(&m, map, sizeof(m));
  const int bytes = m.box_columns * m.box_rows;
  require(m.box_columns == 64 || m.box_columns == 128, "tensor copy: swizzle");
  check_shared(shared, bytes);
  Block& own = *S.fiber->block;
  const long offset = static_cast<char*>(shared) - own.shared;
  require(offset % (8 * m.box_columns) == 0, "tensor copy: shared alignment");
  for (int rank = 0; rank < S.cluster_size; rank++) {
    if (!(blocks >> rank & 1)) continue;
    Block& other = S.blocks[own.cluster * S.cluster_size + rank];
    char* base = other.shared;
    uint64_t* remote_barrier = static_cast<uint64_t*>(remote(barrier, rank));
    start_transfer({[=] { land_box(m, base + offset, base, column, row); }, bytes, remote_barrier});
  }
}
}  // namespace emu

namespace ptx {

inline void byte_tensor_copy(void* shared, const TensorMap* map, int column, int row,
                             uint64_t* barrier) {
  emu::start_box(shared, map, column, row, barrier, 1u << emu::cluster_rank());
}
inline void byte_tensor_multicast(void* shared, const TensorMap* map, int column, int row,
                                  uint64_t* barrier, uint16_t blocks) {
  emu::start_box(shared, map, column, row, barrier, blocks);
}
inline void mbarrier_arrive_remote(uint64_t* local, uint32_t rank) {
  emu::mbarrier_arrive(static_cast<uint64_t*>(emu::remote(local, rank)), 0);
}

}  // namespace ptx
