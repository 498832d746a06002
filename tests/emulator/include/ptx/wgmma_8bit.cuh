// Emulated csrc/ptx/wgmma_8bit.cuh. Metadata is read when the instruction is issued, operands and
// accumulators when it executes.
#pragma once

#include "common/types.cuh"
#include "ptx/wgmma.cuh"

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

namespace ptx {

struct Float8 {
  using Sum = float;
};
struct Int8 {
  using Sum = int;
};

inline void pin_registers_8bit(float&) { asm volatile("" ::: "memory"); }
inline void pin_registers_8bit(int&) { asm volatile("" ::: "memory"); }
inline void pin_registers_8bit(uint32_t&) { asm volatile("" ::: "memory"); }

inline void keep_order(int natural) { emu::require(natural >= 0, "keep_order: a negative number"); }

// The offset in the block's shared memory in units of 16 bytes, and the swizzle in the upper bits.
template <int ROW_BYTES>
inline uint64_t swizzled_descriptor(uint32_t low) {
  return low | uint64_t(ROW_BYTES == 128 ? 1 : 2) << 62;
}
template <int ROW_BYTES>
inline uint64_t swizzled_descriptor(const void* shared) {
  emu::check_shared(shared, 8 * ROW_BYTES);
  const uint64_t offset = static_cast<const char*>(shared) - emu::S.fiber->block->shared;
  emu::require(offset % (8 * ROW_BYTES) == 0, "wgmma: operand not aligned to its swizzle atom");
  return swizzled_descriptor<ROW_BYTES>(static_cast<uint32_t>(offset >> 4));
}

inline float emulated_value(uint8_t bits, Float8) {
  static const float* const table = [] {
    float* t = new float[256];
    for (int i = 0; i < 256; i++) {
      const int exponent = i >> 3 & 15, mantissa = i & 7;
      const float magnitude = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
      t[i] = (i & 127) == 127 ? NAN : i & 128 ? -magnitude : magnitude;
    }
    return t;
  }();
  return table[bits];
}
inline int emulated_value(uint8_t bits, Int8) { return static_cast<int8_t>(bits); }

// Byte k of row r of an operand.
inline uint8_t emulated_byte(const char* shared, uint64_t descriptor, int r, int k) {
  const int row_bytes = descriptor >> 62 == 1 ? 128 : 64;
  uint64_t at = ((descriptor & 0x3fff) << 4) + r * row_bytes + k;
  at ^= (at >> 7 & (row_bytes / 16 - 1)) << 4;
  return shared[at];
}

template <int N, class Operand, bool SPARSE>
struct Wgmma8bit {
  using Sum = typename Operand::Sum;
  static constexpr int K = SPARSE ? 64 : 32;

  static void mma(Sum (&d)[N / 2], uint64_t a, uint64_t b, uint32_t metadata, int accumulate) {
    const char* shared = emu::S.fiber->block->shared;
    const uint32_t fragment[4] = {metadata, 0, 0, 0};
    emu::issue(reinterpret_cast<float*>(d), fragment,
               [=](emu::GroupOperation& op) { execute(op, shared, a, b, accumulate); });
  }

 private:
  // The kept element `i` (of 32) of row r, as its place among K.
  static int place(const emu::GroupOperation& op, int r, int i) {
    if (!SPARSE) return i;
    const int group = i / 2;  // of four k
    const int lane = r % 8 * 4 + r / 8 % 2 + group / 8 * 2;
    const uint32_t word = op.fragments[r / 16 * 32 + lane][0];
    return 4 * group + (word >> (4 * (group % 8) + i % 2 * 2) & 3);
  }

  static void execute(emu::GroupOperation& op, const char* shared, uint64_t a, uint64_t b,
                      int accumulate) {
    static Sum B[K][N], D[64][N];
    const Operand type = Operand();
    for (int n = 0; n < N; n++)
      for (int k = 0; k < K; k++) B[k][n] = emulated_value(emulated_byte(shared, b, n, k), type);
    memset(D, 0, sizeof(D));
    for (int r = 0; r < 64; r++)
      for (int i = 0; i < 32; i++) {
        const Sum v = emulated_value(emulated_byte(shared, a, r, i), type);
        const Sum* row = B[place(op, r, i)];
        if (v != 0)
          for (int n = 0; n < N; n++) D[r][n] += v * row[n];
      }
    for (int thread = 0; thread < 128; thread++) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      Sum* d = reinterpret_cast<Sum*>(op.accumulators[thread]);
      for (int j = 0; j < N / 8; j++)
        for (int i = 0; i < 4; i++)
          d[4 * j + i] =
              (accumulate ? d[4 * j + i] : 0) + D[row + i / 2 * 8][8 * j + 2 * t + i % 2];
    }
  }
};

}  // namespace ptx
