// Emulated csrc/ptx/bulk_copy.cuh.
#pragma once

#include "common/types.cuh"

struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

namespace emu {
// What the emulator puts into a TensorMap: a matrix of 16-bit elements, and the box that one copy
// brings.
struct Matrix {
  const char* base;
  long long row_bytes;
  int columns, rows;          // of the matrix
  int box_columns, box_rows;  // of a copy
  bool swizzled;              // 128-byte rows whose 16-byte chunks are permuted by XOR with row % 8
};
static_assert(sizeof(Matrix) <= sizeof(TensorMap), "fits");
}  // namespace emu

namespace ptx {

// The elected lane is the same one every time, as on hardware.
inline bool elect_one() {
  emu::warp_barrier();
  return emu::lane() == 0;
}
inline int warp_uniform(int value) { return emu::shuffle(value, 0); }

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emu::require(bytes % 16 == 0 && bytes > 0, "bulk copy: size");
  emu::require(reinterpret_cast<uintptr_t>(shared) % 16 == 0, "bulk copy: shared alignment");
  emu::require(reinterpret_cast<uintptr_t>(global) % 16 == 0, "bulk copy: global alignment");
  emu::check_shared(shared, bytes);
  emu::start_transfer({[=] { memcpy(shared, global, bytes); }, int(bytes), barrier});
}

inline void bulk_copy_to_cluster(void* shared, const void* global, uint32_t bytes,
                                 uint64_t* barrier, uint16_t blocks) {
  emu::require(blocks >> emu::S.cluster_size == 0, "bulk copy: blocks outside the cluster");
  for (uint32_t rank = 0; rank < uint32_t(emu::S.cluster_size); rank++)
    if (blocks >> rank & 1)
      bulk_copy(emu::remote(shared, rank), global, bytes,
                static_cast<uint64_t*>(emu::remote(barrier, rank)));
}

inline void tensor_copy_2d(void* shared, const TensorMap* map, int column, int row,
                           uint64_t* barrier) {
  emu::Matrix m;
  memcpy(&m, map, sizeof(m));
  const int bytes = m.box_columns * m.box_rows * 2;
  emu::require(reinterpret_cast<uintptr_t>(shared) % (m.swizzled ? 1024 : 128) == 0,
               "tensor copy: shared alignment");
  emu::check_shared(shared, bytes);
  const auto land = [=] {
    char* target = static_cast<char*>(shared);
    for (int r = 0; r < m.box_rows; r++)
      for (int c = 0; c < m.box_columns; c++) {
        uint16_t element = 0;
        const bool inside =
            row + r >= 0 && row + r < m.rows && column + c >= 0 && column + c < m.columns;
        if (inside) memcpy(&element, m.base + (row + r) * m.row_bytes + (column + c) * 2ll, 2);
        int at = (r * m.box_columns + c) * 2;
        if (m.swizzled) at ^= (at >> 7 & 7) << 4;
        memcpy(target + at, &element, 2);
      }
  };
  emu::start_transfer({land, bytes, barrier});
}

inline void prefetch_tensor_map(const TensorMap*) {}

}  // namespace ptx
