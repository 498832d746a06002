// What the 2:4 Marlin kernel computes, and its compile-time shape (sm_90a).
//
//   out[m, n] = sum_k a[m, k] * W[k, n] (+ bias[n]),   W = scale * (code - bias), 2:4 sparse in k
//
// Weights lie in tiles of 64 features x 128 k, [N / 64][K / 128], each one contiguous copy:
//   codes      128 threads x 16 bytes (4 bits) or 32 bytes (8 bits): fragments of the kept values
//   positions  128 threads x 8 bytes
//   scales     64 x fp16, if a group is 128 k: [8 g][4 m][2 h], that of feature 16 m + 8 h + g
// Codes and positions are B_24 and B_meta of marlin_kernel/sparse_format.py.
#pragma once

#include "common/types.cuh"

namespace sparse {

constexpr int kWarpgroupThreads = 128;
constexpr int kTileN = 64;                // features of a weight tile: rows of one wgmma
constexpr int kTileK = 128;               // k of a weight tile, and of a stage
constexpr int kSteps = 4;                 // instructions of 32 k in it
constexpr int kBoxK = 64;                 // k of one swizzled row of tokens
constexpr int kPositionBytes = 1024;
constexpr int kScaleBytes = 128;
constexpr int kOutTokens = 64;            // tokens that are turned around at once when written

template <class Scalar>
struct Problem {
  const uint8_t* weights;  // tiles as above
  const __half* scales;    // [n] if there is one group, else unused
  const Scalar* bias;      // [n] or null
  Scalar* out;             // [m, n], contiguous
  int m;                   // tokens
  int n;                   // features
  int k_tiles;             // weight tiles along k
  int feature_tiles;       // along n
};

// A weight tile of BITS-bit codes; GROUP: k that share a scale (128; 0 = the whole column).
template <int BITS_, int GROUP>
struct TileLayout {
  static constexpr int BITS = BITS_;
  static constexpr bool GROUPED = GROUP != 0;
  static constexpr int CODE_WORDS = BITS;                 // 32-bit words of a thread
  static constexpr int STEP_WORDS = CODE_WORDS / kSteps;  // of one instruction
  static constexpr int CODE_BYTES = kWarpgroupThreads * CODE_WORDS * 4;
  static constexpr int TILE_BYTES = CODE_BYTES + kPositionBytes + (GROUPED ? kScaleBytes : 0);

  static_assert(BITS == 4 || BITS == 8, "codes have 4 or 8 bits");
  static_assert(GROUP == 0 || GROUP == kTileK, "a group is a tile's k or the whole column");
};

template <class Scalar_,       // __half or __nv_bfloat16: activations and output
          int BITS_,           // of a code: 4 or 8
          int GROUP_,          // k that share a scale: 128; 0 = the whole column
          int TOKENS_,         // tokens of a tile: columns of the wgmma
          int GROUPS_,         // warpgroups that multiply, 64 features each
          int SPLIT_,          // blocks of a cluster that share a tile's k range
          int STAGES_,         // of the ring
          int BLOCKS_PER_SM_,  // blocks that the registers must leave room for
          int STORAGE_BYTES_>  // sizeof(Storage), as the host computes it
struct Config : TileLayout<BITS_, GROUP_> {
  using Scalar = Scalar_;
  using TileLayout<BITS_, GROUP_>::TILE_BYTES;
  static constexpr int TOKENS = TOKENS_;
  static constexpr int GROUPS = GROUPS_;
  static constexpr int SPLIT = SPLIT_;
  static constexpr int STAGES = STAGES_;
  static constexpr int BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr int STORAGE_BYTES = STORAGE_BYTES_;

  static constexpr int FEATURES = GROUPS * kTileN;
  static constexpr int CONSUMERS = GROUPS * kWarpgroupThreads;
  static constexpr int THREADS = CONSUMERS + kWarpgroupThreads;  // one warpgroup feeds
  static constexpr int SUMS = TOKENS / 2;                        // accumulators of a thread

  static constexpr int BOX_BYTES = TOKENS * kBoxK * 2;
  static constexpr int STAGE_BYTES = GROUPS * TILE_BYTES + 2 * BOX_BYTES;
  static constexpr int OUT_TOKENS = TOKENS < kOutTokens ? TOKENS : kOutTokens;
  static constexpr int OUT_ROW = kTileN + 8;      // elements; padded against bank conflicts
  static constexpr int PARTIAL_ROW = TOKENS + 4;  // sums; likewise

  // Registers per thread: what the launch gives, redistributed to those that multiply.
  static constexpr int FEEDER_REGISTERS = 32;
  static constexpr int LAUNCH_REGISTERS = 65536 / (THREADS * BLOCKS_PER_SM) / 8 * 8;
  static constexpr int SHARE =
      (LAUNCH_REGISTERS * THREADS - FEEDER_REGISTERS * kWarpgroupThreads) / CONSUMERS / 8 * 8;
  static constexpr int CONSUMER_REGISTERS = SHARE < 240 ? SHARE : 240;

  static_assert(SPLIT <= 8, "portable clusters have at most 8 blocks");
};

// Dynamic shared memory.
template <class Config>
struct Storage {
  struct Ring {
    alignas(1024) uint8_t tokens[Config::STAGES][2][Config::BOX_BYTES];
    alignas(128) uint8_t weights[Config::STAGES][Config::GROUPS][Config::TILE_BYTES];
  };
  using Partial = float[Config::FEATURES][Config::PARTIAL_ROW];
  using Out = typename Config::Scalar[Config::GROUPS][Config::OUT_TOKENS][Config::OUT_ROW];

  Ring ring;
  alignas(16) uint8_t out[Config::SPLIT == 1 ? sizeof(Out) : 16];
  alignas(16) uint64_t full[Config::STAGES];
  alignas(16) uint64_t empty[Config::STAGES];

  static_assert(Config::SPLIT == 1 || sizeof(Partial) <= sizeof(Ring),
                "the sums of a tile must fit where the ring was");
};

}  // namespace sparse
