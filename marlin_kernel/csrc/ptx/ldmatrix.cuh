// Loads of 8 x 8 matrices of 16-bit elements from shared memory into mma fragments.
#pragma once

#include "common/types.cuh"

namespace ptx {

// ldmatrix.x2: lanes 0..15 each give the address of one 16-byte row (8 rows per matrix). Register i
// of lane l receives elements 2 * (l % 4) and + 1 of row l / 4 of matrix i.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ldmatrix.x4: the same with four matrices, whose rows lanes 0..31 address.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace ptx
