// Warp-wide sparse matrix multiply-accumulate (sm_80 and newer).
//
// m16n8k32: A holds the kept half of 16 x 32, in the fragments of a dense m16n8k16 (ptx/mma.cuh).
// B (32 x 8): b[i] = column g, k 8 i + 2 t .. 8 i + 2 t + 1 (g = lane / 4, t = lane % 4). C as of
// m16n8k16. Metadata and SELECTOR as in ptx/wgmma_sparse.cuh.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma-sp
#pragma once

#include "common/types.cuh"

namespace ptx {

// mma.sp::ordered_metadata.sync.m16n8k32, fp32 accumulator: c += a * b.
template <int SELECTOR>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata,
                                                __half) {
  asm(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(SELECTOR));
}
template <int SELECTOR>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata,
                                                __nv_bfloat16) {
  asm(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(SELECTOR));
}

}  // namespace ptx
