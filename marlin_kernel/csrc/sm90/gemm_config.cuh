// Compile-time shape of the warpgroup kernel.
#pragma once

#include "sm90/problem.cuh"

namespace sm90 {

constexpr int kWarpgroupThreads = 128;

template <class Weight_,       // of common/weight_types.cuh
          class Scalar_,       // __half or __nv_bfloat16: activations and output
          int GROUP_,          // k that share a scale: 16, 32, 64, 128; 0 = the whole column
          int TOKENS_,         // tokens of a tile
          int WARPGROUPS_,     // that multiply: 2 to 4
          int M_TILES_,        // 64-feature tiles of each warpgroup: 1 or 2
          // blocks of a cluster that share a tile's k range; 1: see Problem::split; 0: the last tiles
          // are shared by all blocks in equal stretches of k, see Walk
          int CLUSTER_,
          int STAGES_,         // of the ring
          int BLOCKS_PER_SM_,  // blocks that the registers must leave room for
          int STAGE_TILES_,    // 64-k tiles of a stage: 1 or 2
          int SCALE_SUMS_,     // 1: scales multiply the sums of a group; 0: the weights
          int STORAGE_BYTES_>  // sizeof(GemmStorage), as the host computes it
struct GemmConfig {
  using Weight = Weight_;
  using Scalar = Scalar_;
  static constexpr int GROUP = GROUP_;
  static constexpr int TOKENS = TOKENS_;
  static constexpr int WARPGROUPS = WARPGROUPS_;
  static constexpr int M_TILES = M_TILES_;
  static constexpr bool SPREAD = CLUSTER_ == 0;
  static constexpr int CLUSTER = SPREAD ? 1 : CLUSTER_;
  static constexpr int STAGES = STAGES_;
  static constexpr int BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr bool SCALE_SUMS = SCALE_SUMS_ != 0 && GROUP != 0;
  static constexpr bool SCALE_WEIGHTS = SCALE_SUMS_ == 0 && GROUP != 0;
  static constexpr int STORAGE_BYTES = STORAGE_BYTES_;

  static constexpr int STAGE_TILES = STAGE_TILES_;

  using Rows = RowLayout<Weight, GROUP>;
  static constexpr int CONSUMERS = WARPGROUPS * kWarpgroupThreads;
  static constexpr int THREADS = CONSUMERS + kWarpgroupThreads;  // one warpgroup feeds
  static constexpr int COLUMNS = WARPGROUPS * M_TILES;  // column tiles of a block
  static constexpr int FEATURES = COLUMNS * kTileN;
  static constexpr int SUMS = TOKENS / 2;  // accumulators of a lane for one 64-feature tile

  // A stage: codes and rows of groups of the columns, and activations in boxes of 64 k. Columns come
  // in the pairs in which they lie; of an odd number each by itself, as every other block begins in
  // the middle of a pair.
  static constexpr int SLOT_COLUMNS = COLUMNS % 2 == 0 ? 2 : 1;
  static constexpr int SLOTS = COLUMNS / SLOT_COLUMNS;
  static constexpr int GROUP_ROWS =  // groups of a stage
      GROUP == 0 ? 0 : GROUP < STAGE_TILES * kTileK ? STAGE_TILES * kTileK / GROUP : 1;
  static constexpr int SLOT_CODES = STAGE_TILES * SLOT_COLUMNS * kTileBytes<Weight>;
  static constexpr int SLOT_BYTES = SLOT_CODES + GROUP_ROWS * SLOT_COLUMNS * kRowBytes<Weight>;
  static constexpr int BOX_BYTES = TOKENS * kTileK * static_cast<int>(sizeof(Scalar));

  // Steps: the multiplications between two commits; with scaled sums a step ends where a group
  // does. A unit is a tile of all columns, or the two tiles of a stage that share a group.
  static constexpr int STEP_K16 = SCALE_SUMS && GROUP < kTileK ? GROUP / 16 : kStepsPerTile;
  static constexpr int PARTS = kStepsPerTile / STEP_K16;  // steps along the k of a tile
  static constexpr int STEPS = PARTS * M_TILES;           // steps of a tile of all columns
  static constexpr bool HAS_ROOM =  // in its registers for units of two tiles
      BLOCKS_PER_SM == 1 ||
      (Weight::ZEROS == Zeros::NONE &&
       (M_TILES == 1 ? TOKENS <= 32 : TOKENS == 16 && CLUSTER == 1 && kIsSame<Scalar, __half>));
  static constexpr int UNIT_TILES = STAGE_TILES == 2 && GROUP > kTileK && HAS_ROOM ? 2 : 1;
  static constexpr int UNIT_STEPS = UNIT_TILES * STEPS;
  static constexpr int STEP_ROWS = GROUP == 0 ? 0 : ceil_div(Rows::kPerTile, PARTS);

  // Registers per thread: what the launch gives, redistributed to those that multiply.
  static constexpr int FEEDER_REGISTERS =
      WARPGROUPS == 4 ? 24 : WARPGROUPS == 3 ? 56 : BLOCKS_PER_SM == 2 ? 32 : 40;
  static constexpr int CONSUMER_REGISTERS =
      WARPGROUPS == 4 ? 112 : WARPGROUPS == 3 ? 152 : BLOCKS_PER_SM == 2 ? 104 : 232;

  static constexpr int FEATURES_PER_RANK = ceil_div(FEATURES, CLUSTER);
  static constexpr int PARTIAL_ROW = TOKENS + 4;        // floats; padded against bank conflicts
  // Tokens of large tiles are written in turns, so that memory is left for stages.
  static constexpr int OUT_TOKENS = M_TILES * TOKENS > 128 ? 64 : TOKENS;
  static constexpr int OUT_ROW = M_TILES * kTileN + 8;  // elements; likewise

  static_assert(STAGES > 2 || STEPS * STAGE_TILES > 1,
                "a stage is opened one step before its predecessor's predecessor is released");
  static_assert(STEP_K16 >= 2, "a step is long enough to be worth a commit");
  static_assert(SLOT_BYTES % 16 == 0, "bulk copies go to multiples of 16 bytes");
  static_assert(TOKENS % 8 == 0 && TOKENS <= 256, "tokens are the columns of a wgmma");
  static_assert(CLUSTER >= 1 && CLUSTER <= 8, "portable clusters have at most 8 blocks");
  static_assert(WARPGROUPS >= 2 && WARPGROUPS <= 4, "registers are shared by so many");
  static_assert(BLOCKS_PER_SM * WARPGROUPS <= 4, "no share of registers is defined");
};

// Leaves registers to one more warp of 32 in each part of a multiprocessor: the launch that gathers
// activations for the next product (gather.cuh) can then begin before this one ends.
template <class Config>
struct LeavingRoom : Config {
  static_assert(Config::BLOCKS_PER_SM == 1 && Config::WARPGROUPS == 2, "others leave it anyway");
  static constexpr int LAUNCH_REGISTERS = 160;    // instead of 168
  static constexpr int CONSUMER_REGISTERS = 216;  // two warpgroups and the feeder's 40: 472 of 480
};

// Dynamic shared memory.
template <class Config>
struct GemmStorage {
  struct Ring {
    alignas(1024) uint8_t tokens[Config::STAGES][Config::STAGE_TILES][Config::BOX_BYTES];
    alignas(128) uint8_t weights[Config::STAGES][Config::SLOTS][Config::SLOT_BYTES];
  };
  using Partial = float[Config::FEATURES][Config::PARTIAL_ROW];
  using Out = typename Config::Scalar[Config::WARPGROUPS][Config::OUT_TOKENS][Config::OUT_ROW];

  Ring ring;
  // The output has its own place, so that the next item's copies run while a tile is written.
  // Blocks of a cluster have one item only, and leave their sums where the ring was.
  alignas(16) uint8_t out[Config::CLUSTER == 1 ? sizeof(Out) : 16];
  alignas(16) uint64_t full[Config::STAGES];
  alignas(16) uint64_t empty[Config::STAGES];
  alignas(16) int arrivals[Config::WARPGROUPS];  // parts of a tile that were finished before

  static_assert(Config::CLUSTER == 1 || sizeof(Partial) <= sizeof(Ring),
                "the sums of a tile must fit where the ring was");
};

}  // namespace sm90
