// 2:4 pruning of four consecutive inputs (a quad): which weights of an output become zero. The
// selection of gptq/sparsity.py. A set of weights is a mask with bit i for weight i of the quad.
#pragma once

#include "common/types.cuh"

namespace gptq {

constexpr int kQuad = 4;
constexpr int kKept = 2;   // weights of a quad that stay
constexpr int kPairs = 6;  // ways to remove the others
constexpr int kTerms = 3;  // coefficients of x^2, x y, y^2 in the cost of removing (x, y)

using RemovalCosts = float[kPairs][kTerms];  // of one quad

struct Removal {
  float cost;
  unsigned weights;  // mask
};

__device__ __forceinline__ Removal cheaper(Removal earlier, Removal later) {
  return later.cost < earlier.cost ? later : earlier;
}

// The pair of w[0..3] whose removal costs least, the first of equals (sparsity.choose_pairs).
// costs: as sparsity.pair_costs gives them.
__device__ __forceinline__ unsigned cheapest_pair(const float* w, const RemovalCosts& costs) {
  Removal removals[kPairs];
  int pair = 0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
#pragma unroll
    for (int j = i + 1; j < kQuad; ++j, ++pair) {
      const float(&c)[kTerms] = costs[pair];
      const float mixed = fmaf(w[i] * w[i], c[0], w[i] * w[j] * c[1]);
      removals[pair] = {fmaf(w[j] * w[j], c[2], mixed), 1u << i | 1u << j};
    }
  const Removal first = cheaper(removals[0], removals[1]);
  const Removal middle = cheaper(removals[2], removals[3]);
  const Removal last = cheaper(removals[4], removals[5]);
  return cheaper(cheaper(first, middle), last).weights;  // a tree: 3 steps of latency, not 5
}

// The weights that must stay zero when others change (not sparsity.movable): all but those that are
// not zero now and the first zeros that fill them up to kKept. nonzero: mask.
__device__ __forceinline__ unsigned fixed_zeros(unsigned nonzero) {
  int filled = 0, empty = 0;  // places of the next weight that is not zero, of the next that is
  unsigned fixed = 0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) empty += nonzero >> i & 1;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const bool set = nonzero >> i & 1;
    const int place = set ? filled : empty;
    if (place >= kKept) fixed |= 1u << i;
    filled += set;
    empty += !set;
  }
  return fixed;
}

}  // namespace gptq
