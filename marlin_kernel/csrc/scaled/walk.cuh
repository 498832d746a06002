// The order in which persistent blocks work on tiles.
#pragma once

#include "common/types.cuh"
#include "ptx/cluster.cuh"

namespace scaled {

// The tiles of this block, in bands of kBand token tiles, so that blocks running at the same time
// share weights and tokens. With MULTICAST a cluster takes neighbouring feature tiles.
template <class Config>
struct Walk {
  static constexpr int kBand = 8;
  int tile, tiles, column_steps, token_blocks, clusters;
  int rank;  // in the cluster

  template <class Problem>
  __device__ __forceinline__ explicit Walk(const Problem& p)
      : tile(static_cast<int>(blockIdx.x) / Config::CLUSTER),
        column_steps(ceil_div(p.n, Config::FEATURES * Config::MULTICAST)),
        token_blocks(ceil_div(p.m, Config::TOKENS)),
        clusters(static_cast<int>(gridDim.x) / Config::CLUSTER),
        rank(Config::CLUSTER == 1 ? 0 : static_cast<int>(ptx::cluster_rank())) {
    tiles = column_steps * token_blocks;
  }
  __device__ __forceinline__ bool done() const { return tile >= tiles; }
  __device__ __forceinline__ void next() { tile += clusters; }
  __device__ __forceinline__ void place(int& feature, int& token) const {
    const int band = tile / (kBand * column_steps);
    const int in_band = tile - band * kBand * column_steps;
    const int height = min(kBand, token_blocks - band * kBand);
    const int column = in_band / height;
    token = (band * kBand + in_band % height) * Config::TOKENS;
    feature = (Config::MULTICAST == 1 ? column : column * Config::MULTICAST + rank) *
              Config::FEATURES;
  }
  // Stages of this block's part of the k range.
  template <class Problem>
  __device__ __forceinline__ int k_begin(const Problem& p) const {
    return Config::SPLIT == 1 ? 0 : p.k_tiles * rank / Config::SPLIT;
  }
  template <class Problem>
  __device__ __forceinline__ int k_end(const Problem& p) const {
    return Config::SPLIT == 1 ? p.k_tiles : p.k_tiles * (rank + 1) / Config::SPLIT;
  }
};

}  // namespace scaled
