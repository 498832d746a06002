// Compile-time shape of the small-batch kernel of dense weights.
#pragma once

#include "sm90/small_batch.cuh"

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
          int STORAGE_BYTES_>  // sizeof(SmallBatchStorage), as the host computes it
struct DecodeConfig : SmallBatchShape<TOKEN_TILES_, WARPS_N_, WARPS_K_, SPLIT_, STAGES_,
                                      BLOCKS_PER_SM_, STORAGE_BYTES_> {
  using Weight = Weight_;
  using Scalar = Scalar_;
  using Rows = RowLayout<Weight, GROUP_>;
  static constexpr int GROUP = GROUP_;
  static constexpr int TILE_K = kTileK;
  static constexpr int STAGE_BYTES = kTileBytes<Weight> + Rows::kBytesPerTile;
};

// The same, with activations that are picked by an index (act-order).
template <class Config>
struct Gathering : Config {
  static constexpr bool GATHERS = true;
};

}  // namespace sm90
