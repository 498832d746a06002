// Warp-wide products of 8-bit operands, 32 k at a time.
//
// Fragments of m16n8k32, for lane l with g = l / 4 and t = l % 4 (four bytes per register):
//   A (16 x 32): a[0] = row g, k 4t..4t+3; a[1] = row g+8, same k; a[2], a[3] = these rows, k + 16
//   B (32 x 8):  b[0] = column g, k 4t..4t+3; b[1] = same column, k + 16
//   C (16 x 8):  c[0], c[1] = row g, columns 2t, 2t+1; c[2], c[3] = row g+8
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
#pragma once

#include "common/types.cuh"

namespace ptx {

#if defined(MARLIN_SM75) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)

// mma.sync.m8n8k16, int8 operands, int32 accumulator (sm_75): 8 rows and 16 k at a time.
__device__ __forceinline__ void mma_m8n8k16(int& c0, int& c1, uint32_t a, uint32_t b) {
  asm(
      "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
      : "+r"(c0), "+r"(c1)
      : "r"(a), "r"(b));
}

__device__ __forceinline__ void mma_m16n8k32(int (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], int8_t) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mma_m8n8k16(c[0], c[1], a[2 * half], b[half]);
    mma_m8n8k16(c[2], c[3], a[2 * half + 1], b[half]);
  }
}

#else

// mma.sync.m16n8k32, int8 operands, int32 accumulator (sm_80 and newer): c += a * b.
__device__ __forceinline__ void mma_m16n8k32(int (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], int8_t) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// mma.sync.m16n8k32, e4m3 operands, fp32 accumulator (sm_89 and newer; sm_90 converts to fp16).
__device__ __forceinline__ void mma_m16n8k32(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], float8_e4m3) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ptx
