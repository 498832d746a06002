// One row of the normal equations of a scale refit: for every output the sums of products of two
// columns over the inputs of each group,
//
//   A[i][j] = A[j][i] = sum over inputs k of group i: p[k] c[k],    i = j .. groups - 1
//
// where p = H c_j and c are the codes minus zero points (gptq/solver.py: _refit_scales).
#pragma once

#include "common/types.cuh"

namespace gptq {

struct DotsProblem {
  const float* products;  // [rows, n]: inputs from group `first` on
  const float* codes;     // [rows, n]
  float* matrix;          // [n, groups, groups]
  int rows;
  int n;                  // outputs
  int group;              // inputs of a group; the last one may have fewer
  int first;              // group j
  int groups;
};

// Grid: (tiles of THREADS outputs, groups from `first` on). A thread sums one group of one output.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) dots_kernel(const DotsProblem p) {
  const int output = blockIdx.x * THREADS + threadIdx.x;
  if (output >= p.n) return;
  const int start = blockIdx.y * p.group, stop = min(start + p.group, p.rows);
  long long at = static_cast<long long>(start) * p.n + output;
  float sum = 0.0f;
#pragma unroll 8
  for (int row = start; row < stop; ++row, at += p.n)
    sum = fmaf(p.products[at], p.codes[at], sum);
  const int i = p.first + blockIdx.y, j = p.first;
  float* matrix = p.matrix + static_cast<long long>(output) * p.groups * p.groups;
  matrix[i * p.groups + j] = sum;
  matrix[j * p.groups + i] = sum;
}

}  // namespace gptq
