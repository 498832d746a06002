// What the kernel keeps in shared memory.
#pragma once

#include "sm80/tile_config.cuh"

namespace sm80 {

// The ring carries, per stage, all that one k tile needs: weights, activations and that tile's own
// scales and zero points, so no stage ever reads another stage's data. The two regions of the
// epilogue are apart from the ring: copies for the next tile run on while they are used.
template <class Config>
struct alignas(128) SharedStorage {
  static constexpr bool ZEROS = Config::ZERO_CHUNKS > 0;

  uint4 weights[Config::STAGES][Config::WEIGHT_CHUNKS];
  uint4 activations[Config::STAGES][Config::TOKEN_CHUNKS];
  uint4 scales[Config::GROUPED ? Config::STAGES : 1][Config::GROUPED ? Config::SCALE_CHUNKS : 1];
  uint4 zeros[ZEROS ? Config::STAGES : 1][ZEROS ? Config::ZERO_CHUNKS : 1];
  // partial sums of the warps with warp_k > 0
  float4 reduction[Config::WARPS_K > 1 ? (Config::WARPS_K - 1) * Config::OUTPUT_WARPS *
                                             Config::FRAGMENTS * WARP
                                       : 1];
  // one mma of tokens per output warp, on its way from fragments to rows
  typename Config::Scalar staging[Config::OUTPUT_WARPS]
                                 [MMA_TOKENS * (WARP_FEATURES + STAGING_PAD)];
};

}  // namespace sm80
