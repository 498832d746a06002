// What the wgmma kernel for packed weights and 8-bit activations computes, how its weights lie in
// device memory, and the compile-time shape of a kernel.
//
//   out[m, n] = (sum_k a[m, k] * weight[k, n]) * scale_a[m] (+ bias[n])
//   weight[k, n] = UNIT * byte[k, n] * scale[k / group, n]       (dequant/eight_bit_fragment.cuh)
//
// Integer sums of a group (or of all k) are exact. Sums of e4m3 products keep about 14 bits in the
// tensor cores, so they move on to FP32 registers every 128 k at the latest.
//
// Weights: records [N' / 64 columns][stages of 128 k], each the codes of 64 features x 128 k and
// the scales and zero points that belong to them, so that a stage of a column is one copy:
//   codes, 4 bits  [2][4 m][32 lanes][4 words]: the lane's word of k16 tile 4 i + j of rows 16 m ..
//   codes, 8 bits  [4][4 m][32 lanes][4 words]: k32 step i: rows g and g + 8 of its first 16 k, then
//                  of its other 16 k
//   groups         for each of them [4 m][8 g][2 h] fp16 scales of feature 16 m + 8 h + g (if
//                  GROUP > 0), then bytes 128 - z of the same features (if there are zero points)
// k is counted in the order of the activations: sm80/activations.cuh reorders every 16.
// Scales of the output, scale_b: UNIT times the scale of every feature if GROUP is 0, else UNIT.
#pragma once

#include "common/types.cuh"
#include "common/weight_types.cuh"
#include "scaled/config.cuh"

namespace sm90_8bit {

using scaled::kGroupFeatures;
using scaled::kStageK;
using scaled::kWarpgroupThreads;

constexpr int kStepK = 32;  // of one instruction
constexpr int kSteps = kStageK / kStepK;

// A if CONDITION, else B.
template <bool CONDITION, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

template <class Out>
struct Problem : scaled::Problem<Out> {
  const uint8_t* weights;  // records as above; feature_tiles columns of k_tiles of them
};

template <class Weight_,       // of common/weight_types.cuh
          class Operand_,      // ptx::Float8 or ptx::Int8: activations
          class Out_,          // __half or __nv_bfloat16
          int GROUP_,          // k that share a scale: 32, 64, 128; 0: all
          int TOKENS_,         // tokens of a tile: columns of the wgmma
          int WARPGROUPS_,     // that multiply, 64 features each
          int MULTICAST_,      // blocks of a cluster that work on the same tokens and share them
          int SPLIT_,          // blocks of a cluster that share a tile's k range
          int STAGES_,         // of the ring
          int BLOCKS_PER_SM_,  // blocks that the registers must leave room for
          int LEAD_,           // 1: the first warpgroup starts two stages before the others
          int PART_,           // tokens whose sums move on at once; 0: as registers allow
          int SETS_,           // of sums: one of them moves on while another is multiplied into
          int TURNS_,          // 1: two warpgroups take turns at the tensor cores
          int STORAGE_BYTES_>  // sizeof(Storage), as the host computes it
struct Config {
  using Weight = Weight_;
  using Operand = Operand_;
  using Out = Out_;
  using Sum = typename Operand::Sum;
  static constexpr int GROUP = GROUP_;
  static constexpr int TOKENS = TOKENS_;
  static constexpr int WARPGROUPS = WARPGROUPS_;
  static constexpr int MULTICAST = MULTICAST_;
  static constexpr int SPLIT = SPLIT_;
  static constexpr int CLUSTER = MULTICAST * SPLIT;
  static constexpr int STAGES = STAGES_;
  static constexpr int BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr bool LEAD = LEAD_ != 0;
  static constexpr bool TURNS = TURNS_ != 0;
  static constexpr int STORAGE_BYTES = STORAGE_BYTES_;

  static constexpr int FEATURES = WARPGROUPS * kGroupFeatures;
  static constexpr int CONSUMERS = WARPGROUPS * kWarpgroupThreads;
  static constexpr int THREADS = CONSUMERS + kWarpgroupThreads;  // one warpgroup feeds

  // Products are added up in the accumulators of the instruction over all k, or moved on to FP32
  // totals after every RUN steps, for PART tokens at a time (fewer where registers are short).
  static constexpr bool PROMOTE = GROUP > 0 || kIsSame<Operand, ptx::Float8>;
  static constexpr int RUN = GROUP > 0 ? GROUP / kStepK : kSteps;
  static constexpr bool SMALL_PARTS = TOKENS > 128 || WARPGROUPS > 2 || GROUP == 64;
  static constexpr int LARGEST_PART = SMALL_PARTS ? 32 : 64;
  static constexpr int PART = PART_ > 0               ? PART_
                              : TOKENS < LARGEST_PART ? TOKENS
                                                      : LARGEST_PART;
  static constexpr int SETS = SETS_;
  // Buffers of fragments: the next stage is decoded while this one is multiplied, unless registers
  // are short.
  static constexpr int BUFFERS = SETS == 1 && TOKENS + PART > 320 ? 1 : 2;
  static constexpr int PARTS = TOKENS / PART;
  static constexpr int MOVES = kSteps / RUN * PARTS;  // of a stage
  using Total = typename Either<PROMOTE, float, Sum>::Type;

  // A record.
  static constexpr bool ZEROS = Weight::ZEROS == Zeros::INTEGER;
  static constexpr int CODE_BYTES = kGroupFeatures * kStageK * Weight::BITS / 8;
  static constexpr int GROUPS = GROUP > 0 ? kStageK / GROUP : ZEROS ? 1 : 0;  // rows of a record
  static constexpr int SCALE_BYTES = GROUP > 0 ? 2 * kGroupFeatures : 0;     // of a row
  static constexpr int ROW_BYTES = SCALE_BYTES + (ZEROS ? kGroupFeatures : 0);
  static constexpr int RECORD_BYTES = CODE_BYTES + GROUPS * ROW_BYTES;
  static constexpr int TOKEN_BYTES = TOKENS * kStageK;

  static constexpr int OUT_TOKENS = TOKENS < scaled::kOutTokens ? TOKENS : scaled::kOutTokens;
  static constexpr int OUT_ROW = kGroupFeatures + 8;  // elements; padded against bank conflicts
  static constexpr int PARTIAL_ROW = TOKENS + 4;      // 32-bit sums; likewise

  // Registers per thread: what the launch gives, redistributed to those that multiply.
  static constexpr int FEEDER_REGISTERS = BUFFERS == 1                            ? 24
                                          : WARPGROUPS <= 2 && BLOCKS_PER_SM == 1 ? 40
                                                                                    : 32;
  static constexpr int LAUNCH_REGISTERS = 65536 / (THREADS * BLOCKS_PER_SM) / 8 * 8;
  static constexpr int SHARED_OUT =
      (LAUNCH_REGISTERS * THREADS - FEEDER_REGISTERS * kWarpgroupThreads) / CONSUMERS / 8 * 8;
  static constexpr int CONSUMER_REGISTERS = SHARED_OUT < 240 ? SHARED_OUT : 240;

  static_assert(GROUP == 0 || GROUP == 32 || GROUP == 64 || GROUP == 128,
                "a group is a whole column, 32, 64 or 128 k");
  static_assert(STAGES >= 3, "a stage is opened while the one before it is multiplied");
  static_assert(!LEAD || (WARPGROUPS > 1 && STAGES >= 4 && SPLIT == 1),
                "a leading warpgroup needs room in the ring, and several tiles to be of use");
  static_assert(!ZEROS || Weight::BITS == 4, "zero points come with 4-bit codes");
  static_assert(MULTICAST == 1 || SPLIT == 1, "a cluster shares tokens or a k range, not both");
  static_assert(CLUSTER <= 8, "portable clusters have at most 8 blocks");
  static_assert(TOKENS % (8 * MULTICAST) == 0, "each block of a cluster fetches whole atoms");
  static_assert(FEATURES % SPLIT == 0, "every block of a cluster writes the same share");
  static_assert(TOKENS % PART == 0, "tokens are moved on in whole parts");
  static_assert(SETS == 2 || (SETS == 1 && PROMOTE), "one or two sets of sums move on");
  static_assert(!TURNS || (WARPGROUPS == 2 && SETS == 1 && !LEAD),
                "two warpgroups take turns, neither of them ahead");
};

// Dynamic shared memory.
template <class Config>
struct Storage {
  struct Ring {
    alignas(1024) uint8_t tokens[Config::STAGES][Config::TOKEN_BYTES];
    alignas(128) uint8_t weights[Config::STAGES][Config::WARPGROUPS][Config::RECORD_BYTES];
  };
  using Partial = uint32_t[Config::FEATURES][Config::PARTIAL_ROW];
  using Out = typename Config::Out[Config::WARPGROUPS][Config::OUT_TOKENS][Config::OUT_ROW];

  Ring ring;
  alignas(16) uint8_t out[Config::SPLIT == 1 ? sizeof(Out) : 16];
  alignas(16) float scale_a[Config::WARPGROUPS][Config::TOKENS];
  alignas(16) uint64_t full[Config::STAGES];
  alignas(16) uint64_t empty[Config::STAGES];
  alignas(16) uint64_t lead;  // the first warpgroup has got ahead

  static_assert(Config::SPLIT == 1 || sizeof(Partial) <= sizeof(Ring),
                "the sums of a tile must fit where the ring was");
};

}  // namespace sm90_8bit
