// Emulated csrc/ptx/wgmma_8bit_registers.cuh. The A fragment is read when the instruction is issued
// (the assembler keeps its registers until they have been), B and the accumulators when it executes.
#pragma once

#include "ptx/wgmma_8bit.cuh"

namespace ptx {

template <int N, class Operand>
struct WgmmaRegisters8bit {
  using Sum = typename Operand::Sum;
  static constexpr int K = 32;

  static void mma(Sum (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    const char* shared = emu::S.fiber->block->shared;
    emu::check_shared(shared + ((b & 0x3fff) << 4), N * 128 - 96);
    emu::issue(reinterpret_cast<float*>(d), a,
               [=](emu::GroupOperation& op) { execute(op, shared, b, accumulate); });
  }

 private:
  static void execute(emu::GroupOperation& op, const char* shared, uint64_t b, int accumulate) {
    static Sum A[64][K], B[K][N], D[64][N];
    const Operand type = Operand();
    for (int n = 0; n < N; n++)
      for (int k = 0; k < K; k++) B[k][n] = emulated_value(emulated_byte(shared, b, n, k), type);
    for (int thread = 0; thread < 128; thread++) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (int r = 0; r < 4; r++)
        for (int i = 0; i < 4; i++)
          A[row + r % 2 * 8][r / 2 * 16 + 4 * t + i] =
              emulated_value(static_cast<uint8_t>(op.fragments[thread][r] >> (8 * i)), type);
    }
    memset(D, 0, sizeof(D));
    for (int r = 0; r < 64; r++)
      for (int k = 0; k < K; k++)
        for (int n = 0; n < N; n++) D[r][n] += A[r][k] * B[k][n];
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
