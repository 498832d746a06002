// Stores of 8 x 8 matrices of 16-bit elements from mma fragments to shared memory (sm_90).
#pragma once

#include "common/types.cuh"

namespace ptx {

// stmatrix.x2.trans: element (i, j) of matrix m, held as by mma (lane 4 i + j / 2), goes to element
// i of the 16-byte row j; lanes 0..7 address the rows of matrix 0, lanes 8..15 those of matrix 1.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
__device__ __forceinline__ void stmatrix_x2_transposed(void* row, uint32_t m0, uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(
                   shared_address(row)),
               "r"(m0), "r"(m1)
               : "memory");
}

}  // namespace ptx
