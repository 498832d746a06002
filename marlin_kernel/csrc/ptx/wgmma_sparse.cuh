// Sparse warpgroup matrix multiply-accumulate of 16-bit operands (sm_90a), A from registers.
//
// m64nNk32: A holds the kept half of 64 x 32, so 64 x 16 values, in the fragments of a dense
// m64nNk16 (ptx/wgmma.cuh): a[0] = row g, kept 2t..2t+1; a[1] = row g + 8; a[2], a[3] = these rows,
// kept + 8 (g = lane / 4, t = lane % 4). B: N rows of 64 k (128 bytes), 128-byte swizzle; a step of
// 32 k advances its descriptor by 64 bytes. D as in ptx/wgmma.cuh.
//
// Metadata: of the four lanes that share g, lanes 0 and 1 give it if SELECTOR is 0, lanes 2 and 3
// if it is 1. The first of the two describes k 0..15, the second k 16..31: bits 0..15 row g, bits
// 16..31 row g + 8, four bits for each group of four k: the position (0..3) of the first kept value
// in the lower two, of the second in the upper two.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include "common/types.cuh"
#include "ptx/wgmma.cuh"

namespace ptx {

constexpr uint64_t kWgmmaStepK32 = 64 >> 4;  // what one step of 32 k adds to a descriptor

// d += a * b
template <int N, class Scalar>
struct SparseWgmma;

#define MARLIN_L4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MARLIN_L8(i) MARLIN_L4(i), MARLIN_L4(i + 4)
#define MARLIN_L16(i) MARLIN_L8(i), MARLIN_L8(i + 8)
#define MARLIN_L32(i) MARLIN_L16(i), MARLIN_L16(i + 16)
#define MARLIN_L64(i) MARLIN_L32(i), MARLIN_L32(i + 32)
#define MARLIN_L128(i) MARLIN_L64(i), MARLIN_L64(i + 64)
#define MARLIN_Q4 "%0, %1, %2, %3"
#define MARLIN_Q8 MARLIN_Q4 ", %4, %5, %6, %7"
#define MARLIN_Q16 MARLIN_Q8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MARLIN_Q32 \
  MARLIN_Q16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLIN_Q64 \
  MARLIN_Q32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"
#define MARLIN_Q128 \
  MARLIN_Q64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, " \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, " \
  "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, " \
  "%121, %122, %123, %124, %125, %126, %127"

// wgmma.mma_async.sp. SUMS: registers of D; A0..A3, B, E: numbers of the operands behind them.
#define MARLIN_SPARSE_SELECTED(N, SUMS, TYPE, A0, A1, A2, A3, B, E, SELECTOR)                     \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." TYPE "." TYPE                 \
               " {" MARLIN_Q##SUMS "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", %" E         \
               ", " SELECTOR ", 1, 1, 1, 0;\n"                                                    \
               : MARLIN_L##SUMS(0)                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata))
#define MARLIN_SPARSE_WGMMA(N, SUMS, SCALAR, TYPE, A0, A1, A2, A3, B, E)                          \
  template <>                                                                                     \
  struct SparseWgmma<N, SCALAR> {                                                                 \
    template <int SELECTOR>                                                                       \
    static __device__ __forceinline__ void mma(float (&d)[SUMS], const uint32_t (&a)[4],          \
                                               uint64_t b, uint32_t metadata) {                   \
      if constexpr (SELECTOR == 0)                                                                \
        MARLIN_SPARSE_SELECTED(N, SUMS, TYPE, A0, A1, A2, A3, B, E, "0");                         \
      else                                                                                        \
        MARLIN_SPARSE_SELECTED(N, SUMS, TYPE, A0, A1, A2, A3, B, E, "1");                         \
    }                                                                                             \
  };
#define MARLIN_SPARSE_BOTH(N, SUMS, ...)                              \
  MARLIN_SPARSE_WGMMA(N, SUMS, __half, "f16", __VA_ARGS__)            \
  MARLIN_SPARSE_WGMMA(N, SUMS, __nv_bfloat16, "bf16", __VA_ARGS__)

MARLIN_SPARSE_BOTH(8, 4, "4", "5", "6", "7", "8", "9")
MARLIN_SPARSE_BOTH(16, 8, "8", "9", "10", "11", "12", "13")
MARLIN_SPARSE_BOTH(32, 16, "16", "17", "18", "19", "20", "21")
MARLIN_SPARSE_BOTH(64, 32, "32", "33", "34", "35", "36", "37")
MARLIN_SPARSE_BOTH(128, 64, "64", "65", "66", "67", "68", "69")
MARLIN_SPARSE_BOTH(256, 128, "128", "129", "130", "131", "132", "133")

#undef MARLIN_SPARSE_BOTH
#undef MARLIN_SPARSE_WGMMA
#undef MARLIN_SPARSE_SELECTED
#undef MARLIN_L4
#undef MARLIN_L8
#undef MARLIN_L16
#undef MARLIN_L32
#undef MARLIN_L64
#undef MARLIN_L128
#undef MARLIN_Q4
#undef MARLIN_Q8
#undef MARLIN_Q16
#undef MARLIN_Q32
#undef MARLIN_Q64
#undef MARLIN_Q128

}  // namespace ptx
