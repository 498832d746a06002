// Warp-wide matrix multiply-accumulate (sm_80 and newer; fp16 also on sm_75).
//
// Fragments of m16n8k16, for lane l with g = l / 4 and t = l % 4 (two 16-bit elements per
// register):
//   A (16 x 16): a[0] = row g, k 2t..2t+1; a[1] = row g+8, same k; a[2], a[3] = these rows, k + 8
//   B (16 x 8):  b[0] = column g, k 2t..2t+1; b[1] = same column, k + 8
//   C (16 x 8):  c[0], c[1] = row g, columns 2t, 2t+1; c[2], c[3] = row g+8
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
#pragma once

#include "common/types.cuh"

namespace ptx {

#if defined(MARLIN_SM75) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)

// mma.sync.m16n8k8 twice (sm_75): the same fragments, k 0..7 and k 8..15 apart.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
}

#else

// mma.sync.m16n8k16, fp16 operands, fp32 accumulator: c += a * b.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// mma.sync.m16n8k16, bf16 operands, fp32 accumulator: c += a * b.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ptx
