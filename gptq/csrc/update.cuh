// The sequential part of GPTQ and of the coordinate sweep: inputs one after the other, each spreading
// what its rounding changed over the inputs of the block still to come.
//
//   GPTQ    value w_i             error e_i = (w_i - Q_i) / U_ii    w_j -= U_ij e_i
//   sweep   value q_i + g_i/H_ii  move  e_i = Q_i - q_i             g_j -= H_ij e_i
//
// (g: gradient H (W - q)). With 2:4 pruning (pruning.cuh), Q_i of a removed weight is zero, and the
// other weights may stay as they are instead of being rounded (grids.cuh). Outputs are independent:
// a block of threads takes 32 of them, one per lane. Inputs go in steps of 32: one warp takes them
// in order, in registers; then all warps apply their errors to the block's remaining rows in shared
// memory. Rows behind the block are the caller's, by a matrix product with the errors.
#pragma once

#include "grids.cuh"
#include "pruning.cuh"

namespace gptq {

constexpr int kUpdateWarps = 4;
constexpr int kUpdateThreads = kUpdateWarps * kWarpSize;
constexpr int kStep = 32;    // inputs that one warp takes in order
constexpr int kPropagate = 8;  // rows that a warp updates at a time

struct UpdateProblem {
  const float* values;  // [rows, n] weights, or the gradient
  const float* matrix;  // [rows, rows] block of U, or of H; only the upper triangle is read
  const float* scales;  // [groups, n]
  const float* zeros;   // [groups, n]
  const int* places;    // [rows] group of each input
  void* points;         // [rows, n] Points<GRID>::Stored, written; the sweep also reads them
  float* errors;        // [rows, n] written
  int matrix_row;       // floats from one row of the matrix to the next
  int rows;             // inputs of this block, at most BLOCK
  int n;                // outputs
  int levels;           // 2**bits
  const float* costs;   // [rows / kQuad, kPairs, kTerms] of removals, for GPTQ with pruning
};

template <int BLOCK, class Stored>
struct UpdateStorage {
  alignas(16) float matrix[BLOCK][BLOCK];
  alignas(16) float values[BLOCK][kWarpSize];
  alignas(16) float scales[BLOCK][kWarpSize];
  alignas(16) float zeros[BLOCK][kWarpSize];
  alignas(16) float errors[kStep][kWarpSize];
  float inverse[BLOCK];  // 1 / diagonal
  Stored points[BLOCK][kWarpSize];
  float costs[BLOCK / kQuad][kPairs][kTerms];
};

// Grid: tiles of 32 outputs. PRUNE: two weights of every quad are zero. GRID: what weights are
// rounded to; with kReals the problem has no scales, zeros and places.
template <int BLOCK, bool SWEEP, bool PRUNE, int GRID>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(const UpdateProblem p) {
  static_assert(BLOCK % kStep == 0, "a block is made of whole steps");
  static_assert(kStep % kQuad == 0, "a step is made of whole quads");
  constexpr bool kRounds = GRID != kReals;
  static_assert(kRounds || (PRUNE && !SWEEP), "what is not rounded is pruned, in GPTQ's update");
  static_assert(kStep % (kUpdateWarps * kPropagate) == 0, "each warp propagates whole sets of rows");
  using Stored = typename Points<GRID>::Stored;
  auto& shared = ptx::shared_memory<UpdateStorage<BLOCK, Stored>>();
  Stored* const points = static_cast<Stored*>(p.points);
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int output = blockIdx.x * kWarpSize + lane;
  const bool valid = output < p.n;

  for (int i = thread; i < BLOCK * BLOCK; i += kUpdateThreads) {
    const int row = i / BLOCK, k = i % BLOCK;
    shared.matrix[row][k] =
        row <= k && k < p.rows ? p.matrix[static_cast<long long>(row) * p.matrix_row + k] : 0.0f;
  }
#pragma unroll 8
  for (int row = warp; row < BLOCK; row += kUpdateWarps) {
    const bool there = valid && row < p.rows;
    const long long at = static_cast<long long>(row) * p.n + output;
    const long long group =
        kRounds && there ? static_cast<long long>(p.places[row]) * p.n + output : 0;
    shared.values[row][lane] = there ? p.values[at] : 0.0f;
    if (!kRounds) continue;
    shared.scales[row][lane] = there ? p.scales[group] : 1.0f;
    shared.zeros[row][lane] = there ? p.zeros[group] : 0.0f;
    if (SWEEP) shared.points[row][lane] = there ? points[at] : 0;
  }
  if (PRUNE && !SWEEP) {
    constexpr int kPerQuad = kPairs * kTerms;
    for (int i = thread; i < BLOCK / kQuad * kPerQuad; i += kUpdateThreads)
      (&shared.costs[0][0][0])[i] = i < p.rows / kQuad * kPerQuad ? p.costs[i] : 0.0f;
  }
  ptx::block_sync();
  for (int row = thread; row < BLOCK; row += kUpdateThreads)
    shared.inverse[row] = row < p.rows ? 1.0f / shared.matrix[row][row] : 0.0f;
  const float top = static_cast<float>(p.levels - 1);
  auto nonzero_points = [&](int quad) {  // mask (pruning.cuh) of the four inputs from here on
    unsigned mask = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float point = static_cast<float>(shared.points[quad + j][lane]);
      mask |= (point != shared.zeros[quad + j][lane] ? 1u : 0u) << j;
    }
    return mask;
  };

#pragma unroll 1
  for (int start = 0; start < BLOCK; start += kStep) {
    ptx::block_sync();  // rows of this step have all that came before
    if (warp == 0) {
      float value[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) value[i] = shared.values[start + i][lane];
      unsigned removed = 0;  // weights of the quad at hand that must be zero
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (PRUNE && i % kQuad == 0)
          removed = SWEEP ? fixed_zeros(nonzero_points(start + i))
                          : cheapest_pair(value + i, shared.costs[(start + i) / kQuad]);
        const bool stays = !PRUNE || !(removed >> i % kQuad & 1);
        const float inverse = shared.inverse[start + i];
        float wanted = value[i], old = 0.0f;
        float point = stays ? wanted : 0.0f, rounded = point;
        if constexpr (kRounds) {
          const float scale = shared.scales[start + i][lane], zero = shared.zeros[start + i][lane];
          if (SWEEP) {
            old = value_of(static_cast<float>(shared.points[start + i][lane]), scale, zero);
            wanted = fmaf(value[i], inverse, old);
          }
          const float nearest = Points<GRID>::nearest(wanted, scale, 1.0f / scale, zero, top);
          point = stays ? nearest : zero;
          rounded = value_of(point, scale, zero);
        }
        const float error = SWEEP ? rounded - old : (wanted - rounded) * inverse;
        shared.errors[i][lane] = error;
        shared.points[start + i][lane] = static_cast<Stored>(point);
#pragma unroll
        for (int j = i + 1; j < kStep; ++j)
          value[j] = fmaf(-shared.matrix[start + i][start + j], error, value[j]);
      }
    }
    ptx::block_sync();  // errors of this step are complete
    for (int i = warp; i < kStep; i += kUpdateWarps) {
      if (!valid || start + i >= p.rows) continue;
      const long long at = static_cast<long long>(start + i) * p.n + output;
      p.errors[at] = shared.errors[i][lane];
      points[at] = shared.points[start + i][lane];
    }
    for (int row = start + kStep + warp * kPropagate; row < BLOCK;
         row += kUpdateWarps * kPropagate) {
      float sums[kPropagate];
#pragma unroll
      for (int j = 0; j < kPropagate; ++j) sums[j] = shared.values[row + j][lane];
#pragma unroll 4
      for (int i = 0; i < kStep; ++i) {
        const float error = shared.errors[i][lane];
#pragma unroll
        for (int j = 0; j < kPropagate; ++j)
          sums[j] = fmaf(-shared.matrix[start + i][row + j], error, sums[j]);
      }
#pragma unroll
      for (int j = 0; j < kPropagate; ++j) shared.values[row + j][lane] = sums[j];
    }
  }
}

}  // namespace gptq
