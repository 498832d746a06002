// The sequential part of GPTQ and of the coordinate sweep: inputs one after the other, each spreading
// what its rounding changed over the inputs of the block still to come.
//
//   GPTQ    value w_i             error e_i = (w_i - Q_i) / U_ii    w_j -= U_ij e_i
//   sweep   value q_i + g_i/H_ii  move  e_i = Q_i - q_i             g_j -= H_ij e_i
//
// (g: gradient H (W - q)). With 2:4 pruning (pruning.cuh), Q_i of a removed weight is zero, and the
// other weights may stay as they are instead of being rounded (grids.cuh). Outputs are independent:
// a block of threads takes 32 of them, one per lane. Inputs go in steps of 32: one warp takes them
// in order, in registers, while the others prepare the reciprocals of the next step's scales; then
// all warps apply the errors to the block's remaining rows in shared memory. Rows behind the block
// are the caller's, by a matrix product with the errors. The scales and zero points of integers are
// kept as the fp16 values that they are, so that a multiprocessor has room for two blocks of
// threads: one works while the other's single warp is waiting for itself.
#pragma once

#include "grids.cuh"
#include "pruning.cuh"
#include "ptx/cp_async.cuh"

namespace gptq {

constexpr int kUpdateWarps = 4;
constexpr int kUpdateThreads = kUpdateWarps * kWarpSize;
constexpr int kStep = 32;    // inputs that one warp takes in order
constexpr int kPropagate = 8;  // rows that a warp updates at a time

struct UpdateProblem {
  const float* values;  // [rows, n] weights, or the gradient
  const float* matrix;  // [rows, rows] block of U, or of H; only the upper triangle is read
  const float* scales;  // [groups, n], values that Points<GRID>::Scale has
  const float* zeros;   // [groups, n], fp16 values
  const int* places;    // [rows] group of each input
  void* points;         // [rows, n] Points<GRID>::Stored, written; the sweep also reads them
  float* errors;        // [rows, n] written
  int matrix_row;       // floats from one row of the matrix to the next
  int rows;             // inputs of this block, at most BLOCK
  int n;                // outputs
  int levels;           // 2**bits
  const float* costs;   // [rows / kQuad] RemovalCosts, for GPTQ with pruning
};

template <int BLOCK, int GRID>
struct UpdateStorage {
  alignas(16) float matrix[BLOCK][BLOCK];  // of tiles of 32 x 32, those below the diagonal are free
  alignas(16) float values[BLOCK][kWarpSize];
  alignas(16) float errors[kStep][kWarpSize];
  alignas(16) float reciprocals[2][kStep][kWarpSize];  // 1 / scale, of this step and the next
  float inverse[BLOCK];  // 1 / diagonal
  typename Points<GRID>::Scale scales[BLOCK][kWarpSize];
  __half zeros[BLOCK][kWarpSize];
  typename Points<GRID>::Stored points[BLOCK][kWarpSize];

  // Of a quad of the block's inputs; they lie in the matrix's first free tiles, a row for each.
  __device__ __forceinline__ RemovalCosts& costs(int quad) {
    static_assert(kStep + BLOCK / kQuad <= BLOCK, "there is a row for each quad");
    static_assert(sizeof(RemovalCosts) <= sizeof(float[kStep]), "a tile is wide enough");
    return *reinterpret_cast<RemovalCosts*>(matrix[kStep + quad]);
  }
};

// Copies rows x rows of the matrix, zeros behind them; complete after a wait for all copies.
template <int BLOCK>
__device__ __forceinline__ void start_matrix(float (&shared)[BLOCK][BLOCK], const UpdateProblem& p) {
  constexpr int kPerCopy = 4;
  const bool aligned = p.matrix_row % kPerCopy == 0 && reinterpret_cast<uint64_t>(p.matrix) % 16 == 0;
  if (aligned) {
    constexpr int kCopies = BLOCK / kPerCopy;
    for (int i = threadIdx.x; i < BLOCK * kCopies; i += kUpdateThreads) {
      const int row = i / kCopies, k = i % kCopies * kPerCopy;
      if (k < row / kStep * kStep) continue;
      const bool there = row < p.rows && k < p.rows;
      const float* source = p.matrix + static_cast<long long>(row) * p.matrix_row + k;
      ptx::cp_async_16(&shared[row][k], there ? source : p.matrix,
                       there ? 4 * min(p.rows - k, kPerCopy) : 0);
    }
  } else {
    for (int i = threadIdx.x; i < BLOCK * BLOCK; i += kUpdateThreads) {
      const int row = i / BLOCK, k = i % BLOCK;
      if (k < row / kStep * kStep) continue;
      const bool there = row < p.rows && k < p.rows;
      const float* source = p.matrix + static_cast<long long>(row) * p.matrix_row + k;
      ptx::cp_async_4(&shared[row][k], there ? source : p.matrix, there ? 4 : 0);
    }
  }
  ptx::cp_async_commit();
}

// Copies the costs of removals from rows / kQuad quads, zeros behind them; as start_matrix.
template <int BLOCK, int GRID>
__device__ __forceinline__ void start_costs(UpdateStorage<BLOCK, GRID>& shared,
                                            const UpdateProblem& p) {
  constexpr int kPerQuad = kPairs * kTerms;
  for (int i = threadIdx.x; i < BLOCK / kQuad * kPerQuad; i += kUpdateThreads) {
    const int quad = i / kPerQuad;
    const bool there = quad < p.rows / kQuad;
    ptx::cp_async_4(&shared.costs(quad)[0][0] + i % kPerQuad, there ? p.costs + i : p.costs,
                    there ? 4 : 0);
  }
  ptx::cp_async_commit();
}

// Grid: tiles of 32 outputs. PRUNE: two weights of every quad are zero. GRID: what weights are
// rounded to; with kReals the problem has no scales, zeros and places.
template <int BLOCK, bool SWEEP, bool PRUNE, int GRID>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(const UpdateProblem p) {
  static_assert(BLOCK % kStep == 0, "a block is made of whole steps");
  static_assert(kStep % kQuad == 0, "a step is made of whole quads");
  static_assert(kStep % (kUpdateWarps * kPropagate) == 0, "each warp propagates whole sets of rows");
  constexpr bool kRounds = GRID != kReals;
  static_assert(kRounds || (PRUNE && !SWEEP), "what is not rounded is pruned, in GPTQ's update");
  using Scale = typename Points<GRID>::Scale;
  using Stored = typename Points<GRID>::Stored;
  auto& shared = ptx::shared_memory<UpdateStorage<BLOCK, GRID>>();
  Stored* const points = static_cast<Stored*>(p.points);
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int output = blockIdx.x * kWarpSize + lane;
  const bool valid = output < p.n;

  start_matrix<BLOCK>(shared.matrix, p);
  if (PRUNE && !SWEEP) start_costs(shared, p);
#pragma unroll 8
  for (int row = warp; row < BLOCK; row += kUpdateWarps) {
    const bool there = valid && row < p.rows;
    const long long at = static_cast<long long>(row) * p.n + output;
    const long long group =
        kRounds && there ? static_cast<long long>(p.places[row]) * p.n + output : 0;
    shared.values[row][lane] = there ? p.values[at] : 0.0f;
    if (!kRounds) continue;
    shared.scales[row][lane] = static_cast<Scale>(there ? p.scales[group] : 1.0f);
    shared.zeros[row][lane] = static_cast<__half>(there ? p.zeros[group] : 0.0f);
    if (SWEEP) shared.points[row][lane] = there ? points[at] : 0;
  }
  ptx::cp_async_wait<0>();
  ptx::block_sync();
  auto prepare = [&](int start, int first, int warps) {
    if (!kRounds) return;
#pragma unroll 1
    for (int i = first; i < kStep; i += warps)
      shared.reciprocals[start / kStep % 2][i][lane] =
          1.0f / static_cast<float>(shared.scales[start + i][lane]);
  };
  prepare(0, warp, kUpdateWarps);
  for (int row = thread; row < BLOCK; row += kUpdateThreads)
    shared.inverse[row] = row < p.rows ? 1.0f / shared.matrix[row][row] : 0.0f;
  const float top = static_cast<float>(p.levels - 1);
  auto nonzero_points = [&](int quad) {  // mask (pruning.cuh) of the four inputs from here on
    unsigned mask = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float point = static_cast<float>(shared.points[quad + j][lane]);
      const float zero = static_cast<float>(shared.zeros[quad + j][lane]);
      mask |= (point != zero ? 1u : 0u) << j;
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
                          : cheapest_pair(value + i, shared.costs((start + i) / kQuad));
        const bool stays = !PRUNE || !(removed >> i % kQuad & 1);
        const float inverse = shared.inverse[start + i];
        float wanted = value[i], old = 0.0f;
        float point = stays ? wanted : 0.0f, rounded = point;
        if constexpr (kRounds) {
          const float scale = static_cast<float>(shared.scales[start + i][lane]);
          const float zero = static_cast<float>(shared.zeros[start + i][lane]);
          const float reciprocal = shared.reciprocals[start / kStep % 2][i][lane];
          if (SWEEP) {
            old = value_of(static_cast<float>(shared.points[start + i][lane]), scale, zero);
            wanted = fmaf(value[i], inverse, old);
          }
          const float nearest = Points<GRID>::nearest(wanted, scale, reciprocal, zero, top);
          point = stays ? nearest : zero;
          rounded = value_of(point, scale, zero);
        }
        const float error = SWEEP ? rounded - old : (wanted - rounded) * inverse;
        shared.errors[i][lane] = error;
        shared.points[start + i][lane] = static_cast<Stored>(point);
        const float4* row = reinterpret_cast<const float4*>(&shared.matrix[start + i][start]);
#pragma unroll
        for (int q = (i + 1) / 4; q < kStep / 4; ++q) {
          const float4 four = row[q];
          const int j = 4 * q;
          if (j > i) value[j] = fmaf(-four.x, error, value[j]);
          if (j + 1 > i) value[j + 1] = fmaf(-four.y, error, value[j + 1]);
          if (j + 2 > i) value[j + 2] = fmaf(-four.z, error, value[j + 2]);
          value[j + 3] = fmaf(-four.w, error, value[j + 3]);
        }
      }
    } else if (start + kStep < BLOCK) {
      prepare(start + kStep, warp - 1, kUpdateWarps - 1);
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
        const float4* entries = reinterpret_cast<const float4*>(&shared.matrix[start + i][row]);
#pragma unroll
        for (int q = 0; q < kPropagate / 4; ++q) {
          const float4 four = entries[q];
          sums[4 * q] = fmaf(-four.x, error, sums[4 * q]);
          sums[4 * q + 1] = fmaf(-four.y, error, sums[4 * q + 1]);
          sums[4 * q + 2] = fmaf(-four.z, error, sums[4 * q + 2]);
          sums[4 * q + 3] = fmaf(-four.w, error, sums[4 * q + 3]);
        }
      }
#pragma unroll
      for (int j = 0; j < kPropagate; ++j) shared.values[row + j][lane] = sums[j];
    }
  }
}

}  // namespace gptq
