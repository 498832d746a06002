// Compile-time description of one sm_80 kernel: types, tile sizes, warps, stages, and the shared
// memory they need.
//
// The matrix instruction computes C^T = W^T A^T: output features are its 16 rows, tokens its 8
// columns. One warp owns 64 features (a packed 16 x 64 tile holds exactly its A-side fragments) and
// WARP_M tokens.
#pragma once

#include "common/types.cuh"
#include "common/weight_types.cuh"

namespace sm80 {

constexpr int WARP = kWarpSize;
constexpr int PACKED_K = 16;      // k of one packed tile
constexpr int MMA_TOKENS = 8;     // tokens of one mma (its N side)
constexpr int WARP_FEATURES = 64; // features of one warp: the width of a packed tile
constexpr int ROW_TILES = 4;      // mma of 16 features in one warp
constexpr int CHUNK_BYTES = 16;   // of one copy
constexpr int OUTPUT_CHUNK = 8;   // elements of C in 16 bytes
constexpr int STAGING_PAD = 8;    // elements that shift the rows of the output staging by 4 banks

template <class Weight_,     // of namespace weights
          class Activation_, // __half, __nv_bfloat16, int8_t or float8_e4m3
          class Scalar_,     // __half or __nv_bfloat16: bias and output; activations of 16 bits too
          int WARP_M_,       // tokens of one warp: 8, 16, 32 or 64
          int WARPS_M_,      // warps along tokens
          int WARPS_N_,      // warps along features
          int WARPS_K_,      // warps that share one output tile and split each stage along k
          int TILE_K_,       // k of one stage
          int STAGES_,       // depth of the copy ring
          bool SCALE_WEIGHTS_,  // groups: scale every weight, not the sum of every group
          int GROUP_SIZE_,   // inputs per scale; 0: one scale per feature, applied at the end
          bool PERMUTED_,    // inputs are gathered by an index
          bool REDUCE_HALF_> // blocks exchange sums in fp16 instead of fp32
struct TileConfig {
  using Weight = Weight_;
  using Activation = Activation_;
  using Scalar = Scalar_;
  static constexpr int WARP_M = WARP_M_;
  static constexpr int WARPS_M = WARPS_M_;
  static constexpr int WARPS_N = WARPS_N_;
  static constexpr int WARPS_K = WARPS_K_;
  static constexpr int TILE_K = TILE_K_;
  static constexpr int STAGES = STAGES_;
  static constexpr bool SCALE_WEIGHTS = SCALE_WEIGHTS_;
  static constexpr int GROUP_SIZE = GROUP_SIZE_;
  static constexpr bool PERMUTED = PERMUTED_;
  static constexpr bool REDUCE_HALF = REDUCE_HALF_;

  static constexpr bool EIGHT_BIT = sizeof(Activation) == 1;  // quantized, with a scale per token
  static constexpr int MMA_K = 32 / sizeof(Activation);         // k of one mma
  static constexpr int CHUNK = CHUNK_BYTES / sizeof(Activation);  // activations in one copy

  static constexpr int TILE_M = WARP_M * WARPS_M;
  static constexpr int TILE_N = WARP_FEATURES * WARPS_N;
  static constexpr int OUTPUT_WARPS = WARPS_M * WARPS_N;
  static constexpr int THREADS = OUTPUT_WARPS * WARPS_K * WARP;
  static constexpr int TOKEN_TILES = WARP_M / MMA_TOKENS;  // mma of one warp along tokens
  static constexpr int STEPS = TILE_K / MMA_K / WARPS_K;   // mma steps of one warp in one stage

  static constexpr bool GROUPED = GROUP_SIZE > 0;
  static constexpr int SCALE_ROWS = !GROUPED ? 0 : TILE_K > GROUP_SIZE ? TILE_K / GROUP_SIZE : 1;
  static constexpr int GROUP_STEPS = GROUPED ? GROUP_SIZE / MMA_K : STEPS;  // mma steps per scale

  // Steps that the compiler may interleave: where accumulators fill the registers, none; few where
  // zero points or sums of 8-bit products need registers beside them; and not the sums of one group
  // with those of the next.
  static constexpr int UNROLL = WARP_M >= 64 || (WARP_M >= 32 && EIGHT_BIT) ? 1
                                : WARP_M >= 32 && kZeroBytes<Weight> > 0    ? 2
                                : WARP_M >= 32 && GROUP_STEPS < STEPS       ? GROUP_STEPS
                                                                            : STEPS;

  // 16-byte chunks of weights of one lane in a packed tile
  static constexpr int LANE_CHUNKS = Weight::BITS / 4;
  static constexpr int BLOCK_CHUNKS = WARP * LANE_CHUNKS;              // of one packed tile
  static constexpr int WEIGHT_CHUNKS = TILE_K / PACKED_K * WARPS_N * BLOCK_CHUNKS;  // of a stage
  static constexpr int ROW_CHUNKS = TILE_K / CHUNK;                    // of one token's row
  static constexpr int TOKEN_CHUNKS = TILE_M * ROW_CHUNKS;
  // of one row of scales and of zero points: 8 features have kScaleBytes and kZeroBytes
  static constexpr int SCALE_ROW_CHUNKS = TILE_N / 8 * kScaleBytes<Weight> / CHUNK_BYTES;
  static constexpr int ZERO_ROW_CHUNKS = TILE_N / 8 * kZeroBytes<Weight> / CHUNK_BYTES;
  static constexpr int SCALE_CHUNKS = SCALE_ROWS * SCALE_ROW_CHUNKS;
  static constexpr int ZERO_CHUNKS = SCALE_ROWS * ZERO_ROW_CHUNKS;
  static constexpr int FRAGMENTS = ROW_TILES * TOKEN_TILES;  // accumulator fragments of one thread

  static_assert(WARP_M == 8 || WARP_M % 16 == 0,
                "one ldmatrix.x2 or whole ldmatrix.x4 per mma step");
  static_assert(WARP_M <= 64, "the accumulators of 64 tokens fill 128 registers");
  static_assert(!GROUPED || SCALE_WEIGHTS || WARP_M <= 32,
                "a group's own sums beside the total ones would not fit the registers");
  static_assert(ROW_CHUNKS % 8 == 0, "the swizzle permutes eight 16-byte chunks of a row");
  static_assert(TILE_K % (MMA_K * WARPS_K) == 0, "every warp takes whole mma steps of a stage");
  static_assert(STAGES >= 2, "one stage is read while another one lands");
  static_assert(!GROUPED || GROUP_SIZE % MMA_K == 0, "an mma lies inside one group");
  static_assert(!GROUPED || TILE_K % GROUP_SIZE == 0 || GROUP_SIZE % TILE_K == 0,
                "a stage holds whole groups or lies inside one");
  static_assert(!GROUPED || GROUP_STEPS % STEPS == 0 || STEPS % GROUP_STEPS == 0,
                "a warp's steps hold whole groups or lie inside one");
  static_assert(GROUPED || Weight::ZEROS == Zeros::NONE,
                "stored zero points come with groups (one group: its rows are repeated)");
  static_assert(Weight::SCALES == Scales::HALF || SCALE_WEIGHTS,
                "scales of one byte multiply weights");
  static_assert(!EIGHT_BIT || !SCALE_WEIGHTS, "sums of 8-bit products are scaled, not weights of 8 bits");
  static_assert(EIGHT_BIT || kIsSame<Activation, Scalar>, "16-bit activations give 16-bit outputs");
  static_assert(!PERMUTED || !EIGHT_BIT, "8-bit activations are in the order of the weights");
  static_assert(ZERO_ROW_CHUNKS * CHUNK_BYTES == TILE_N / 8 * kZeroBytes<Weight>,
                "a row of zero points is whole chunks");
  static_assert(THREADS <= 1024, "hardware limit");
};

// Sizes and addresses of one multiplication C[M, N] = A[M, K] W[K, N] (+ bias): the kernel's
// argument.
template <class Config>
struct Problem {
  const typename Config::Activation* activations;  // [M, K]
  const uint4* weights;       // packed words [K' / 16, N' * bits / 2], as on disk
  const void* scales;         // groups: [K' / group, N'] in the stored column order; else fp16 [N']
  const void* zeros;          // [K' / group, N' / 8 entries], or null: dequant/dequantizer.cuh
  const int* permutation;     // [K']: column of A for each row of W, negative: none; or null
  const float* token_scales;  // [M] (8-bit activations), or null
  const float* global_scale;  // one factor of all weights, or null
  const typename Config::Scalar* bias;  // [N] or null
  typename Config::Scalar* output;      // [M, N], contiguous
  void* partials;             // workspace for sums of tiles that several blocks share; any contents
  int* arrivals;              // workspace of counters: zero on entry and on exit
  long long row_stride;       // elements between rows of A
  int m, n, k;                // real sizes; with a permutation k is its length K'
  int n_padded, k_padded;     // N' (a multiple of 64), K' (a multiple of 64 and of the group)
  int splits;                 // 0: stream-K over the grid; > 0: k ranges of every tile
  int in_turn;                // splits > 0: one block takes all parts of a tile
};

}  // namespace sm80
