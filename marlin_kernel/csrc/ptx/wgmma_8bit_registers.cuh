// Warpgroup matrix multiply-accumulate of 8-bit operands (sm_90a), A from registers, B from shared
// memory.
//
// m64nNk32: warp w of the warpgroup holds rows 16 w .. 16 w + 15 of A and D. With g = lane / 4 and
// t = lane % 4, a[0] holds row g, k 4 t .. 4 t + 3; a[1] row g + 8; a[2] and a[3] the same rows, 16
// k further. d as in ptx/wgmma_8bit.cuh. B: N rows of 32 bytes, K-major and swizzled
// (swizzled_descriptor).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include "ptx/wgmma_8bit.cuh"

namespace ptx {

// d = a * b + (accumulate ? d : 0)
template <int N, class Operand>
struct WgmmaRegisters8bit;

#define MARLIN_P4 "%0, %1, %2, %3"
#define MARLIN_P8 MARLIN_P4 ", %4, %5, %6, %7"
#define MARLIN_P16 MARLIN_P8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MARLIN_P32 \
  MARLIN_P16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLIN_P64                                                                       \
  MARLIN_P32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
             "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
             "%61, %62, %63"
#define MARLIN_P96                                                                              \
  MARLIN_P64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "    \
             "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, " \
             "%95"
#define MARLIN_P128                                                                            \
  MARLIN_P96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "    \
             "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "  \
             "%122, %123, %124, %125, %126, %127"
#define MARLIN_L4(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define MARLIN_L8(C, i) MARLIN_L4(C, i), MARLIN_L4(C, i + 4)
#define MARLIN_L16(C, i) MARLIN_L8(C, i), MARLIN_L8(C, i + 8)
#define MARLIN_L32(C, i) MARLIN_L16(C, i), MARLIN_L16(C, i + 16)
#define MARLIN_L64(C, i) MARLIN_L32(C, i), MARLIN_L32(C, i + 32)
#define MARLIN_L96(C, i) MARLIN_L64(C, i), MARLIN_L32(C, i + 64)
#define MARLIN_L128(C, i) MARLIN_L64(C, i), MARLIN_L64(C, i + 64)
#define MARLIN_FLOAT(x) "+f"(x)
#define MARLIN_INT(x) "+r"(x)

// SUMS: registers of D; A0 .. A3, B, S: numbers of the operands that follow them: A, the descriptor
// of B, `accumulate`.
#define MARLIN_WGMMA(N, SUMS, OPERAND, C, TYPES, TAIL, A0, A1, A2, A3, B, S)                   \
  template <>                                                                                  \
  struct WgmmaRegisters8bit<N, OPERAND> {                                                      \
    static __device__ __forceinline__ void mma(OPERAND::Sum (&d)[SUMS], const uint32_t (&a)[4], \
                                               uint64_t b, int accumulate) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" S                                      \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32." TYPES " {" MARLIN_P##SUMS     \
                   "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p" TAIL ";\n}\n"          \
                   : MARLIN_L##SUMS(C, 0)                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));     \
    }                                                                                          \
  };
#define MARLIN_WGMMA_BOTH(N, SUMS, ...)                                                  \
  MARLIN_WGMMA(N, SUMS, Float8, MARLIN_FLOAT, "f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__)    \
  MARLIN_WGMMA(N, SUMS, Int8, MARLIN_INT, "s32.s8.s8", "", __VA_ARGS__)

MARLIN_WGMMA_BOTH(8, 4, "4", "5", "6", "7", "8", "9")
MARLIN_WGMMA_BOTH(16, 8, "8", "9", "10", "11", "12", "13")
MARLIN_WGMMA_BOTH(32, 16, "16", "17", "18", "19", "20", "21")
MARLIN_WGMMA_BOTH(64, 32, "32", "33", "34", "35", "36", "37")
MARLIN_WGMMA_BOTH(128, 64, "64", "65", "66", "67", "68", "69")
MARLIN_WGMMA_BOTH(192, 96, "96", "97", "98", "99", "100", "101")
MARLIN_WGMMA_BOTH(256, 128, "128", "129", "130", "131", "132", "133")

#undef MARLIN_WGMMA_BOTH
#undef MARLIN_WGMMA
#undef MARLIN_P4
#undef MARLIN_P8
#undef MARLIN_P16
#undef MARLIN_P32
#undef MARLIN_P64
#undef MARLIN_P96
#undef MARLIN_P128
#undef MARLIN_L4
#undef MARLIN_L8
#undef MARLIN_L16
#undef MARLIN_L32
#undef MARLIN_L64
#undef MARLIN_L96
#undef MARLIN_L128
#undef MARLIN_FLOAT
#undef MARLIN_INT

}  // namespace ptx
