// Emulated csrc/ptx/wgmma.cuh. The A fragment is read when the instruction is issued (the assembler
// keeps its registers until they have been), B and the accumulators when it executes.
#pragma once

#include "common/types.cuh"
#include "ptx/mma.cuh"

namespace ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() { emu::commit_group(); }
template <int Pending>
inline void wgmma_wait() {
  emu::wait_groups(Pending);
}
inline void pin_register(int&) { asm volatile("" ::: "memory"); }
template <int Count>
inline void pin_registers(float (&)[Count]) {
  asm volatile("" ::: "memory");
}

// The offset in the block's shared memory, in units of 16 bytes.
inline uint64_t wgmma_descriptor(const void* shared) {
  emu::check_shared(shared, 1024);
  const uint64_t offset = static_cast<const char*>(shared) - emu::S.fiber->block->shared;
  emu::require(offset % 1024 == 0, "wgmma: operand not aligned to its swizzle atom");
  return offset >> 4;
}
constexpr uint64_t kWgmmaStepK16 = 32 >> 4;

// Element (row n, k) of a K-major operand with the 128-byte swizzle.
template <class Scalar>
inline float emulated_operand(const char* shared, uint64_t descriptor, int n, int k, Scalar type) {
  uint64_t at = (descriptor << 4) + n / 8 * 1024 + n % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  memcpy(&bits, shared + at, 2);
  return emulated_element(bits, 0, type);
}

template <int N, class Scalar>
struct Wgmma {
  static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    const char* shared = emu::S.fiber->block->shared;
    emu::check_shared(shared + (b << 4), N / 8 * 1024 - 96);
    emu::issue(d, a, [=](emu::GroupOperation& op) { execute(op, shared, b, accumulate); });
  }

 private:
  static void execute(emu::GroupOperation& op, const char* shared, uint64_t b, int accumulate) {
    static float A[64][16], B[16][N], D[64][N];
    const Scalar type = Scalar();
    for (int n = 0; n < N; n++)
      for (int k = 0; k < 16; k++) B[k][n] = emulated_operand(shared, b, n, k, type);
    for (int thread = 0; thread < 128; thread++) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (int r = 0; r < 4; r++)
        for (int h = 0; h < 2; h++)
          A[row + r % 2 * 8][2 * t + r / 2 * 8 + h] =
              emulated_element(op.fragments[thread][r], h, type);
    }
    memset(D, 0, sizeof(D));
    for (int i = 0; i < 64; i++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < N; n++) D[i][n] += A[i][k] * B[k][n];
    for (int thread = 0; thread < 128; thread++) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (int j = 0; j < N / 8; j++)
        for (int i = 0; i < 4; i++) {
          float& d = op.accumulators[thread][4 * j + i];
          d = (accumulate ? d : 0.f) + D[row + i / 2 * 8][8 * j + 2 * t + i % 2];
        }
    }
  }
};

}  // namespace ptx
