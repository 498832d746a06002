// What the scaled GEMM computes, and the compile-time shape of a kernel.
//
//   out[m, n] = (sum_k a[m, k] * b[n, k]) * scale_a[m] * scale_b[n] (+ bias[n])
//
// 8-bit a and b (FP8 e4m3 with FP32 sums, INT8 with exact INT32 sums). b may be 2:4 sparse: only
// the two kept of four consecutive k are stored, in order of k, and 2-bit positions beside them
// (marlin_kernel/sparse.py). As everywhere in this project output features are the rows of the
// matrix instruction, which is where sparsity is allowed, and tokens its columns.
#pragma once

#include "common/types.cuh"
#include "ptx/wgmma_8bit.cuh"

namespace scaled {

constexpr int kWarpgroupThreads = 128;
constexpr int kGroupFeatures = 64;       // rows of one wgmma
constexpr int kStageK = 128;             // k of a stage
constexpr int kMetadataBytes = 1024;     // of 64 features x 128 k: two words a thread
constexpr int kOutTokens = 64;           // tokens that are turned around at once when written

template <class Out>
struct Problem {
  const float* scale_a;      // one, or of every token
  const float* scale_b;      // one, or of every feature
  const Out* bias;           // [n] or null
  Out* out;                  // [m, n], contiguous
  const uint8_t* metadata;   // [n / 64 tiles][k / 128 tiles][1024 bytes], sparse only
  int scale_a_stride;        // 0: one scale, 1: one per token
  int scale_b_stride;        // 0: one scale, 1: one per feature
  int m;                     // tokens
  int n;                     // features
  int k_tiles;               // stages of the whole k range
  int feature_tiles;         // of 64
};

template <class Operand_,      // ptx::Float8 or ptx::Int8
          class Out_,          // __half or __nv_bfloat16
          int SPARSE_,         // 1: b is 2:4 sparse
          int TOKENS_,         // tokens of a tile: columns of the wgmma
          int GROUPS_,         // warpgroups that multiply, 64 features each
          int MULTICAST_,      // blocks of a cluster that work on the same tokens and share them
          int SPLIT_,          // blocks of a cluster that share a tile's k range
          int STAGES_,         // of the ring
          int BLOCKS_PER_SM_,  // blocks that the registers must leave room for
          int STORAGE_BYTES_>  // sizeof(Storage), as the host computes it
struct Config {
  using Operand = Operand_;
  using Out = Out_;
  using Sum = typename Operand::Sum;
  static constexpr bool SPARSE = SPARSE_ != 0;
  static constexpr int TOKENS = TOKENS_;
  static constexpr int GROUPS = GROUPS_;
  static constexpr int MULTICAST = MULTICAST_;
  static constexpr int SPLIT = SPLIT_;
  static constexpr int CLUSTER = MULTICAST * SPLIT;
  static constexpr int STAGES = STAGES_;
  static constexpr int BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr int STORAGE_BYTES = STORAGE_BYTES_;

  static constexpr int FEATURES = GROUPS * kGroupFeatures;
  static constexpr int CONSUMERS = GROUPS * kWarpgroupThreads;
  static constexpr int THREADS = CONSUMERS + kWarpgroupThreads;  // one warpgroup feeds
  static constexpr int SUMS = TOKENS / 2;                        // accumulators of a thread
  static constexpr int STEPS = SPARSE ? 2 : 4;                   // instructions of a stage

  static constexpr int WEIGHT_ROW = SPARSE ? kStageK / 2 : kStageK;  // bytes, as is the swizzle
  static constexpr int WEIGHT_BYTES = FEATURES * WEIGHT_ROW;
  static constexpr int TOKEN_BYTES = TOKENS * kStageK;
  static constexpr int META_BYTES = SPARSE ? GROUPS * kMetadataBytes : 0;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES + META_BYTES;
  static constexpr int OUT_TOKENS = TOKENS < kOutTokens ? TOKENS : kOutTokens;
  static constexpr int OUT_ROW = kGroupFeatures + 8;  // elements; padded against bank conflicts
  static constexpr int PARTIAL_ROW = TOKENS + 4;      // 32-bit sums; likewise

  // Registers per thread: what the launch gives, redistributed to those that multiply.
  static constexpr int FEEDER_REGISTERS = 32;
  static constexpr int LAUNCH_REGISTERS = 65536 / (THREADS * BLOCKS_PER_SM) / 8 * 8;
  static constexpr int CONSUMER_REGISTERS =
      ((LAUNCH_REGISTERS * THREADS - FEEDER_REGISTERS * kWarpgroupThreads) / CONSUMERS / 8 * 8) <
              240
          ? ((LAUNCH_REGISTERS * THREADS - FEEDER_REGISTERS * kWarpgroupThreads) / CONSUMERS / 8 *
             8)
          : 240;

  static_assert(MULTICAST == 1 || SPLIT == 1, "a cluster shares tokens or a k range, not both");
  static_assert(CLUSTER <= 8, "portable clusters have at most 8 blocks");
  static_assert(TOKENS % (8 * MULTICAST) == 0, "each block of a cluster fetches whole atoms");
};

// Dynamic shared memory.
template <class Config>
struct Storage {
  struct Ring {
    alignas(1024) uint8_t tokens[Config::STAGES][Config::TOKEN_BYTES];
    alignas(1024) uint8_t weights[Config::STAGES][Config::WEIGHT_BYTES];
    alignas(128) uint8_t metadata[Config::STAGES][Config::META_BYTES > 0 ? Config::META_BYTES : 16];
  };
  using Partial = uint32_t[Config::FEATURES][Config::PARTIAL_ROW];
  using Out = typename Config::Out[Config::GROUPS][Config::OUT_TOKENS][Config::OUT_ROW];

  Ring ring;
  alignas(16) uint8_t out[Config::SPLIT == 1 ? sizeof(Out) : 16];
  alignas(16) float scale_a[Config::GROUPS][Config::TOKENS];
  alignas(16) uint64_t full[Config::STAGES];
  alignas(16) uint64_t empty[Config::STAGES];

  static_assert(Config::SPLIT == 1 || sizeof(Partial) <= sizeof(Ring),
                "the sums of a tile must fit where the ring was");
};

}  // namespace scaled
