// Compile-time shape of the small-batch kernel.
#pragma once

#include "sm90/problem.cuh"

namespace sm90 {

template <class Weight_,       // of common/weight_types.cuh
          class Scalar_,       // __half or __nv_bfloat16: activations and output
          int GROUP_,          // k that share a scale: 16, 32, 64, 128; 0 = the whole column
          int TOKEN_TILES_,    // tokens / 8 that one block multiplies
          int WARPS_N_,        // warps side by side: 64 features each
          int WARPS_K_,        // warps that share those features' k range
          int SPLIT_,          // blocks of a cluster that share it further
          int STAGES_,         // tiles in flight per warp
          int BLOCKS_PER_SM_,  // blocks that the registers must leave room for
          int STORAGE_BYTES_>  // sizeof(DecodeStorage), as the host computes it
struct DecodeConfig {
  using Weight = Weight_;
  using Scalar = Scalar_;
  static constexpr int GROUP = GROUP_;
  static constexpr int TOKEN_TILES = TOKEN_TILES_;
  static constexpr int WARPS_N = WARPS_N_;
  static constexpr int WARPS_K = WARPS_K_;
  static constexpr int SPLIT = SPLIT_;
  static constexpr int STAGES = STAGES_;
  static constexpr int BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr int STORAGE_BYTES = STORAGE_BYTES_;
  static constexpr bool GATHERS = false;

  using Rows = RowLayout<Weight, GROUP>;
  static constexpr int TOKENS = 8 * TOKEN_TILES;
  static constexpr int WARPS = WARPS_N * WARPS_K;
  static constexpr int THREADS = WARPS * kWarpSize;
  static constexpr int FEATURES = WARPS_N * kTileN;
  static constexpr int FEATURES_PER_RANK = FEATURES / SPLIT;
  static constexpr int STAGE_BYTES = kTileBytes<Weight> + Rows::kBytesPerTile;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;

  static_assert(SPLIT == 1 || SPLIT == 2 || SPLIT == 4 || SPLIT == 8,
                "a portable cluster has at most 8 blocks; the reduction halves evenly");
};

// The same, with activations that are picked by an index (act-order).
template <class Config>
struct Gathering : Config {
  static constexpr bool GATHERS = true;
};

// Dynamic shared memory; the activations [m][k range of the block + 8] follow it. If they are
// gathered: [m][K' + 8], and the index of the block's k range, 2 bytes each.
template <class Config>
struct DecodeStorage {
  alignas(128) uint8_t ring[Config::WARPS][Config::RING_BYTES];
  alignas(16) float partial[Config::WARPS][kTileN * Config::TOKENS];  // sums of each warp
  // Those of the block, pushed by the blocks of the cluster: [source][feature of this rank][token].
  // Two places, so that the next column's may arrive while these are read.
  alignas(16) float received[Config::SPLIT > 1 ? 2 : 1][Config::SPLIT][Config::FEATURES_PER_RANK]
                            [Config::TOKENS];
  alignas(16) uint64_t full[Config::WARPS][Config::STAGES];
  alignas(16) uint64_t tokens_full[Config::WARPS_K];  // activations of a run of k have arrived
};

}  // namespace sm90
