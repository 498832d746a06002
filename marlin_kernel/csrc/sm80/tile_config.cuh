// Compile-time description of one sm_80 kernel: tile sizes, warps, stages, and the shared memory
// they need.
//
// The matrix instruction computes C^T = W^T A^T: output features are its 16 rows, tokens its 8
// columns. One warp owns 64 features (a packed 16 x 64 tile holds exactly its A-side fragments) and
// WARP_M tokens.
#pragma once

#include "common/types.cuh"

namespace sm80 {

constexpr int WARP = kWarpSize;
constexpr int MMA_K = 16;         // k of one mma
constexpr int MMA_TOKENS = 8;     // tokens of one mma (its N side)
constexpr int WARP_FEATURES = 64; // features of one warp: the width of a packed tile
constexpr int ROW_TILES = 4;      // mma of 16 features in one warp
constexpr int CHUNK = 8;          // 16-bit elements in one 16-byte copy
constexpr int STAGING_PAD = 8;    // elements that shift the rows of the output staging by 4 banks

template <class Scalar_,     // __half or __nv_bfloat16: activations, bias, output (not scales)
          int WARP_M_,       // tokens of one warp: 8, 16, 32 or 64
          int WARPS_M_,      // warps along tokens
          int WARPS_N_,      // warps along features
          int WARPS_K_,      // warps that share one output tile and split each stage along k
          int TILE_K_,       // k of one stage
          int STAGES_,       // depth of the copy ring
          bool SCALE_WEIGHTS_,  // groups: scale every weight, not the sum of every group
          int GROUP_SIZE_>   // inputs per scale; 0: one scale per feature, applied at the end
struct TileConfig {
  using Scalar = Scalar_;
  static constexpr int WARP_M = WARP_M_;
  static constexpr int WARPS_M = WARPS_M_;
  static constexpr int WARPS_N = WARPS_N_;
  static constexpr int WARPS_K = WARPS_K_;
  static constexpr int TILE_K = TILE_K_;
  static constexpr int STAGES = STAGES_;
  static constexpr bool SCALE_WEIGHTS = SCALE_WEIGHTS_;
  static constexpr int GROUP_SIZE = GROUP_SIZE_;

  static constexpr int TILE_M = WARP_M * WARPS_M;
  static constexpr int TILE_N = WARP_FEATURES * WARPS_N;
  static constexpr int OUTPUT_WARPS = WARPS_M * WARPS_N;
  static constexpr int THREADS = OUTPUT_WARPS * WARPS_K * WARP;
  static constexpr int TOKEN_TILES = WARP_M / MMA_TOKENS;  // mma of one warp along tokens
  static constexpr int STEPS = TILE_K / MMA_K / WARPS_K;   // k16 steps of one warp in one stage

  static constexpr bool GROUPED = GROUP_SIZE > 0;
  static constexpr int SCALE_ROWS = !GROUPED ? 0 : TILE_K > GROUP_SIZE ? TILE_K / GROUP_SIZE : 1;
  static constexpr int GROUP_STEPS = GROUPED ? GROUP_SIZE / MMA_K : STEPS;  // k16 steps per scale

  // Steps that the compiler may interleave: where accumulators fill the registers, none, and not
  // the sums of one group with those of the next.
  static constexpr int UNROLL = WARP_M >= 64                      ? 1
                                : WARP_M >= 32 && GROUP_STEPS < STEPS ? GROUP_STEPS
                                                                      : STEPS;

  static constexpr int WEIGHT_CHUNKS = TILE_K / MMA_K * WARPS_N * WARP;  // 16 bytes each, per stage
  static constexpr int ROW_CHUNKS = TILE_K / CHUNK;                      // of one token's row
  static constexpr int TOKEN_CHUNKS = TILE_M * ROW_CHUNKS;
  static constexpr int SCALE_CHUNKS = SCALE_ROWS * TILE_N / CHUNK;
  static constexpr int FRAGMENTS = ROW_TILES * TOKEN_TILES;  // accumulator fragments of one thread

  static_assert(WARP_M == 8 || WARP_M % 16 == 0,
                "one ldmatrix.x2 or whole ldmatrix.x4 per k16 step");
  static_assert(WARP_M <= 64, "the accumulators of 64 tokens fill 128 registers");
  static_assert(!GROUPED || SCALE_WEIGHTS || WARP_M <= 32,
                "a group's own sums beside the total ones would not fit the registers");
  static_assert(TILE_K % 64 == 0, "the swizzle permutes the eight 16-byte chunks of 64 elements");
  static_assert(TILE_K % (MMA_K * WARPS_K) == 0, "every warp takes whole k16 steps of a stage");
  static_assert(STAGES >= 2, "one stage is read while another one lands");
  static_assert(!GROUPED || TILE_K % GROUP_SIZE == 0 || GROUP_SIZE % TILE_K == 0,
                "a stage holds whole groups or lies inside one");
  static_assert(!GROUPED || GROUP_STEPS % STEPS == 0 || STEPS % GROUP_STEPS == 0,
                "a warp's steps hold whole groups or lie inside one");
  static_assert(THREADS <= 1024, "hardware limit");
};

// Sizes and addresses of one multiplication C[M, N] = A[M, K] W[K, N] (+ bias): the kernel's
// argument.
template <class Scalar>
struct Problem {
  const Scalar* activations;  // [M, K]
  const uint4* weights;       // packed words [K' / 16, 2 N'], as on disk
  const __half* scales;       // groups: [K' / group, N'] in the stored column order; else [N']
  const Scalar* bias;         // [N] or null
  Scalar* output;             // [M, N], contiguous
  float4* partials;           // workspace for sums of tiles that several blocks share; any contents
  int* arrivals;              // workspace of counters: zero on entry and on exit
  long long row_stride;       // elements between rows of A
  int m, n, k;                // real sizes
  int n_padded, k_padded;     // N' (a multiple of 64), K' (a multiple of 64 and of the group)
  int splits;                 // 0: stream-K over the grid; > 0: k ranges of every tile
  int in_turn;                // splits > 0: one block takes all parts of a tile
};

}  // namespace sm80
