// Warpgroup matrix multiply-accumulate of 8-bit operands (sm_90a), dense and 2:4 sparse, both
// operands in shared memory.
//
// Dense m64nNk32, sparse m64nNk64. A holds 64 rows of 32 bytes (sparse: the kept half of 64 k), B
// N rows of 32 (sparse: 64) bytes, both K-major and swizzled. Warp w of the warpgroup holds rows
// 16 w .. 16 w + 15 of D as in ptx/wgmma.cuh: d[4 j + i] is row lane / 4 + 8 (i / 2), column
// 8 j + 2 (lane % 4) + i % 2.
//
// Sparse metadata: one register per thread. Lane l of warp w describes row
// 16 w + 8 (l % 2) + l / 4 and k 32 (l / 2 % 2) .. + 31: group i of four consecutive k has bits
// 4 i .. 4 i + 3, the position (0..3) of the first kept element in the lower two and of the second
// in the upper two, in ascending order.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include "common/types.cuh"
#include "ptx/wgmma.cuh"

namespace ptx {

struct Float8 {  // e4m3
  using Sum = float;
};
struct Int8 {
  using Sum = int;
};

__device__ __forceinline__ void pin_registers_8bit(float& r) {
  asm volatile("" : "+f"(r)::"memory");
}
__device__ __forceinline__ void pin_registers_8bit(int& r) {
  asm volatile("" : "+r"(r)::"memory");
}
__device__ __forceinline__ void pin_registers_8bit(uint32_t& r) {
  asm volatile("" : "+r"(r)::"memory");
}

// Keeps the assembler from moving instructions past this point, by the end of a basic block: a branch
// that is always taken, since `natural` is no negative number.
__device__ __forceinline__ void keep_order(int natural) {
  asm volatile(
      "{\n"
      ".reg .pred negative;\n"
      "setp.lt.s32 negative, %0, 0;\n"
      "@!negative bra.uni DONE;\n"
      "nanosleep.u32 1;\n"
      "DONE:\n"
      "}\n" ::"r"(natural)
      : "memory");
}

// Descriptor of a K-major operand whose rows are ROW_BYTES long, with the swizzle of that period:
// 8 rows are an atom. The start advances by the bytes of a step along the row. low: its lower word,
// the only one that depends on where the operand lies.
template <int ROW_BYTES>
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t low) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "swizzles of 64 and 128 bytes");
  constexpr uint64_t kSwizzle = (ROW_BYTES == 128 ? 1ull : 2ull) << 62;
  constexpr uint64_t kAtomStride = (8ull * ROW_BYTES >> 4) << 32;
  return low | kAtomStride | kSwizzle;
}
template <int ROW_BYTES>
__device__ __forceinline__ uint64_t swizzled_descriptor(const void* shared) {
  constexpr uint32_t kLeadingUnused = 1u << 16;
  return swizzled_descriptor<ROW_BYTES>((shared_address(shared) & 0x3ffff) >> 4 | kLeadingUnused);
}

// d = a * b + (accumulate ? d : 0); `metadata` is used by the sparse form only.
template <int N, class Operand, bool SPARSE>
struct Wgmma8bit;

#define MARLIN_P8 "%0, %1, %2, %3, %4, %5, %6, %7"
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

// wgmma.mma_async and wgmma.mma_async.sp. SUMS: registers of D; A, B, E, S: numbers of the operands
// that follow them: the two descriptors, then `accumulate`, then the metadata.
#define MARLIN_WGMMA(N, SUMS, OPERAND, C, TYPES, TAIL, A, B, S, E)                                \
  template <>                                                                                     \
  struct Wgmma8bit<N, OPERAND, false> {                                                           \
    static __device__ __forceinline__ void mma(OPERAND::Sum (&d)[SUMS], uint64_t a, uint64_t b,   \
                                               uint32_t, int accumulate) {                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" S                                         \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32." TYPES " {" MARLIN_P##SUMS        \
                   "}, %" A ", %" B ", p" TAIL ";\n}\n"                                           \
                   : MARLIN_L##SUMS(C, 0)                                                         \
                   : "l"(a), "l"(b), "r"(accumulate));                                            \
    }                                                                                             \
  };                                                                                              \
  template <>                                                                                     \
  struct Wgmma8bit<N, OPERAND, true> {                                                            \
    static __device__ __forceinline__ void mma(OPERAND::Sum (&d)[SUMS], uint64_t a, uint64_t b,   \
                                               uint32_t metadata, int accumulate) {               \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" S                                         \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sp.sync.aligned.m64n" #N "k64." TYPES " {" MARLIN_P##SUMS     \
                   "}, %" A ", %" B ", %" E ", 0, p" TAIL ";\n}\n"                                \
                   : MARLIN_L##SUMS(C, 0)                                                         \
                   : "l"(a), "l"(b), "r"(accumulate), "r"(metadata));                             \
    }                                                                                             \
  };
#define MARLIN_WGMMA_BOTH(N, SUMS, A, B, S, E)                                                   \
  MARLIN_WGMMA(N, SUMS, Float8, MARLIN_FLOAT, "f32.e4m3.e4m3", ", 1, 1", A, B, S, E)             \
  MARLIN_WGMMA(N, SUMS, Int8, MARLIN_INT, "s32.s8.s8", "", A, B, S, E)

MARLIN_WGMMA_BOTH(16, 8, "8", "9", "10", "11")
MARLIN_WGMMA_BOTH(32, 16, "16", "17", "18", "19")
MARLIN_WGMMA_BOTH(64, 32, "32", "33", "34", "35")
MARLIN_WGMMA_BOTH(128, 64, "64", "65", "66", "67")
MARLIN_WGMMA_BOTH(192, 96, "96", "97", "98", "99")
MARLIN_WGMMA_BOTH(256, 128, "128", "129", "130", "131")

#undef MARLIN_WGMMA_BOTH
#undef MARLIN_WGMMA
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
