// The clipping search: for every group and output the scale whose rounding error, weighed by the
// group's Hessian factor R, is least: min over candidates of |R^T e|^2, e = Q - W.
//
// A block takes COLUMNS outputs of one group and some of the candidates. For each candidate it
// forms the errors E [GROUP, COLUMNS] in shared memory and multiplies the triangle R^T with them in
// registers. Half of the warps form the errors of the next candidate while the other half
// multiplies. Row j of R^T has j + 1 entries: warp w takes rows from the top and, mirrored, from
// the bottom, so that all warps multiply equally long:
//
//   rows      0 .. H-1     warp 0            H = GROUP / 16
//             H .. 2H-1    warp 1
//             ...
//        GROUP-2H ..       warp 1
//        GROUP-H ..        warp 0
#pragma once

#include "rounding.cuh"

namespace gptq {

constexpr int kSearchWarps = 8;
constexpr int kSearchThreads = kSearchWarps * kWarpSize;

enum GridKind { kSymmetric = 0, kSigned = 1, kZeroPoint = 2 };

struct SearchProblem {
  const float* weights;  // [rows, n]: the inputs of all groups, GROUP rows each, the last maybe fewer
  const float* factors;  // upper triangular R of each group, zero below the diagonal
  const float* shrinks;  // [candidates] factors on the unclipped step
  float* errors;         // [splits, groups, n] least error among a split's candidates
  float* scales;         // [splits, groups, n]
  float* zeros;          // [splits, groups, n]
  long long factor_stride;  // floats from one group's R to the next
  int factor_row;        // floats from one row of R to the next
  int rows;              // inputs in all
  int n;                 // outputs
  int candidates;        // shrink factors; kSigned tries each with both signs
  int kind;              // GridKind
  int levels;            // 2**bits
};

template <int GROUP, int COLUMNS>
struct SearchStorage {
  alignas(16) float factor[GROUP][GROUP];
  alignas(16) float errors[2][GROUP][COLUMNS];
  alignas(16) float partial[2][kSearchWarps][COLUMNS];  // sums of squares of each warp's rows
};

// Steps and zero point of one output's group whose weights span low..high.
struct Range {
  float step, zero;
};

__device__ __forceinline__ Range range_of(float low, float high, int kind, int levels) {
  const float bias = static_cast<float>(levels / 2), top = static_cast<float>(levels - 1);
  const float largest = fmaxf(-low, high);
  if (kind == kSymmetric) return {largest * (2.0f / top), bias};
  if (kind == kSigned) return {(-low >= high ? largest : -largest) / bias, bias};
  low = fminf(low, 0.0f);
  high = fmaxf(high, 0.0f);
  const float step = (high - low) / top;
  const float zero = step > 0.0f ? rintf(-low / fmaxf(step, 1e-30f)) : 0.0f;
  return {step, fminf(fmaxf(zero, 0.0f), top)};
}

// Grid: (tiles of COLUMNS outputs, groups, splits of the candidates).
template <int GROUP, int COLUMNS>
__global__ void __launch_bounds__(kSearchThreads) search_kernel(const SearchProblem p) {
  static_assert(GROUP % 32 == 0, "a warp's 2 * GROUP / 16 rows are read as pairs or quads");
  static_assert(kSearchThreads % COLUMNS == 0 && COLUMNS % kWarpSize == 0,
                "each thread forms the errors of one output");
  constexpr int kRows = GROUP / 16;                        // per warp, at the top and at the bottom
  constexpr int kWide = COLUMNS / kWarpSize;               // outputs per lane in the product
  constexpr int kPhases = kSearchThreads / COLUMNS;        // threads that share an output
  constexpr int kOwn = GROUP / kPhases;                    // inputs per thread
  auto& shared = ptx::shared_memory<SearchStorage<GROUP, COLUMNS>>();
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int group = blockIdx.y % ceil_div(p.rows, GROUP);
  const int split = blockIdx.y / ceil_div(p.rows, GROUP);
  const int groups = ceil_div(p.rows, GROUP);
  const int splits = gridDim.y / groups;
  const int rows = min(GROUP, p.rows - group * GROUP);
  const int column = thread % COLUMNS, phase = thread / COLUMNS;
  const int output = blockIdx.x * COLUMNS + column;
  const bool valid = output < p.n;

  const float* factor = p.factors + group * p.factor_stride;
  for (int i = thread; i < GROUP * GROUP; i += kSearchThreads) {
    const int row = i / GROUP, k = i % GROUP;
    shared.factor[row][k] =
        row <= k && k < rows ? factor[static_cast<long long>(row) * p.factor_row + k] : 0.0f;
  }
  float weight[kOwn];
  float low = 0.0f, high = 0.0f;  // including zero changes no range (range_of)
  const float* source = p.weights + static_cast<long long>(group) * GROUP * p.n + output;
#pragma unroll
  for (int q = 0; q < kOwn; ++q) {
    const int row = q * kPhases + phase;
    weight[q] = valid && row < rows ? source[static_cast<long long>(row) * p.n] : 0.0f;
    low = fminf(low, weight[q]);
    high = fmaxf(high, weight[q]);
  }
  shared.errors[0][phase][column] = low;
  shared.errors[1][phase][column] = high;
  ptx::block_sync();
#pragma unroll
  for (int other = 0; other < kPhases; ++other) {
    low = fminf(low, shared.errors[0][other][column]);
    high = fmaxf(high, shared.errors[1][other][column]);
  }
  ptx::block_sync();
  const Range range = range_of(low, high, p.kind, p.levels);
  const float top = static_cast<float>(p.levels - 1);

  const int all = p.kind == kSigned ? 2 * p.candidates : p.candidates;
  const int first = static_cast<int>(static_cast<long long>(all) * split / splits);
  const int last = static_cast<int>(static_cast<long long>(all) * (split + 1) / splits);
  auto scale_of = [&](int candidate) {
    const bool mirrored = candidate >= p.candidates;
    const float shrink = p.shrinks[mirrored ? candidate - p.candidates : candidate];
    return stored_scale((mirrored ? -range.step : range.step) * shrink);
  };

  auto form_errors = [&](int candidate) {
    const float scale = scale_of(candidate), reciprocal = 1.0f / scale;
    float(&errors)[GROUP][COLUMNS] = shared.errors[candidate & 1];
#pragma unroll
    for (int q = 0; q < kOwn; ++q) {
      const float code = code_of(weight[q], scale, reciprocal, range.zero, top);
      errors[q * kPhases + phase][column] = value_of(code, scale, range.zero) - weight[q];
    }
  };

  auto multiply = [&](int candidate) {
    const float(&errors)[GROUP][COLUMNS] = shared.errors[candidate & 1];
    const int upper = warp * kRows, lower = GROUP - (warp + 1) * kRows;
    float sums[2][kRows][kWide] = {};
    auto add = [&](float(&rows_sums)[kRows][kWide], int row, int i) {
      float e[kWide], r[kRows];
#pragma unroll
      for (int c = 0; c < kWide; ++c) e[c] = errors[i][lane * kWide + c];
#pragma unroll
      for (int j = 0; j < kRows; ++j) r[j] = shared.factor[i][row + j];
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int c = 0; c < kWide; ++c) rows_sums[j][c] = fmaf(r[j], e[c], rows_sums[j][c]);
    };
    int i = 0;
#pragma unroll 2
    for (; i < upper + kRows; ++i) {
      add(sums[0], upper, i);
      add(sums[1], lower, i);
    }
#pragma unroll 2
    for (; i < lower + kRows; ++i) add(sums[1], lower, i);
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        total = fmaf(sums[0][j][c], sums[0][j][c], total);
        total = fmaf(sums[1][j][c], sums[1][j][c], total);
      }
      shared.partial[candidate & 1][warp][lane * kWide + c] = total;
    }
  };

  float best_error = __uint_as_float(0x7f800000u), best_scale = 0.0f;
  auto compare = [&](int candidate) {
    if (phase != 0) return;
    float error = 0.0f;
#pragma unroll
    for (int w = 0; w < kSearchWarps; ++w) error += shared.partial[candidate & 1][w][column];
    if (error < best_error) {
      best_error = error;
      best_scale = scale_of(candidate);
    }
  };

  if (first < last) form_errors(first);
  for (int candidate = first; candidate < last; ++candidate) {
    ptx::block_sync();  // errors of this candidate and sums of the last one are complete
    if (candidate > first) compare(candidate - 1);
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if ((turn == 0) == (warp < kSearchWarps / 2)) {
        if (candidate + 1 < last) form_errors(candidate + 1);
      } else {
        multiply(candidate);
      }
    }
  }
  ptx::block_sync();
  if (first < last) compare(last - 1);
  if (phase == 0 && valid) {
    const long long at = (static_cast<long long>(split) * groups + group) * p.n + output;
    p.errors[at] = best_error;
    p.scales[at] = best_scale;
    p.zeros[at] = range.zero;
  }
}

// Takes the best of all splits, the earlier one of equals. One thread per group and output.
struct PickProblem {
  const float* errors;       // [splits, count] of the search
  const float* found;        // [splits, count] its scales
  const float* found_zeros;  // [splits, count]
  float* scales;             // [count]
  float* zeros;              // [count]
  int splits;
  int count;                 // groups times outputs
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS) pick_kernel(const PickProblem p) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= p.count) return;
  long long best = i;
  for (int split = 1; split < p.splits; ++split) {
    const long long at = static_cast<long long>(split) * p.count + i;
    if (p.errors[at] < p.errors[best]) best = at;
  }
  p.scales[i] = p.found[best];
  p.zeros[i] = p.found_zeros[best];
}

}  // namespace gptq
