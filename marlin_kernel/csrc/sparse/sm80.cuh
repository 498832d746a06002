// 2:4 Marlin kernel for sm_80 and newer: mma.sp, weights in the layout of config.cuh.
//
// A block computes 64 features x TOKENS tokens. Its warps form K_PARTS groups of four (16 features
// each); group p takes the k tiles p, p + K_PARTS, ... Each group feeds a ring of its own by
// cp.async and synchronises for itself only; in the end the groups' sums are added in order.
#pragma once

#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma_sp.cuh"
#include "ptx/shared_memory.cuh"
#include "sparse/config.cuh"
#include "sparse/dequant.cuh"

namespace sparse {

template <class Scalar>
struct Sm80Problem {
  const Scalar* activations;  // [m, k], rows `row_stride` elements apart, on 16 bytes
  const uint8_t* weights;     // tiles (config.cuh)
  const __half* scales;       // [n] if there is one group, else unused
  const Scalar* bias;         // [n] or null
  Scalar* out;                // [m, n], contiguous
  long long row_stride;       // elements between rows of activations
  int m;                      // tokens
  int n;                      // features
  int k;                      // inputs that exist
  int k_tiles;                // weight tiles along k
};

template <class Scalar_,       // __half or __nv_bfloat16: activations and output
          int BITS_,           // of a code: 4 or 8
          int GROUP_,          // k that share a scale: 128; 0 = the whole column
          int TOKENS_,         // of a block
          int K_PARTS_,        // groups of four warps that share the k range
          int STAGES_,         // of each group's ring
          int STORAGE_BYTES_>  // sizeof(Sm80Storage), as the host computes it
struct Sm80Config : TileLayout<BITS_, GROUP_> {
  using Scalar = Scalar_;
  static constexpr int TOKENS = TOKENS_;
  static constexpr int K_PARTS = K_PARTS_;
  static constexpr int STAGES = STAGES_;
  static constexpr int STORAGE_BYTES = STORAGE_BYTES_;
  static constexpr int THREADS = 128 * K_PARTS;
  static constexpr int ROW = kTileK + 8;          // of tokens, padded against bank conflicts
  static constexpr int PARTIAL_ROW = TOKENS + 1;  // sums; likewise

  static_assert(TOKENS % 8 == 0, "tokens are the columns of an mma");
  static_assert(STAGES >= 2, "a ring has two stages at least");
  static_assert(K_PARTS >= 1 && K_PARTS <= 8, "each group has a barrier of its own");
};

template <class Config>
struct Sm80Storage {
  struct Stage {
    alignas(16) uint8_t weights[Config::TILE_BYTES];
    alignas(16) typename Config::Scalar tokens[Config::TOKENS][Config::ROW];
  };
  using Partial = float[Config::K_PARTS][kTileN][Config::PARTIAL_ROW];
  union {
    Stage ring[Config::K_PARTS][Config::STAGES];
    Partial partial;
  };
};

template <class Config>
class Sm80Kernel {
  using Scalar = typename Config::Scalar;
  using Shared = Sm80Storage<Config>;
  using Stage = typename Shared::Stage;

 public:
  __device__ __forceinline__ explicit Sm80Kernel(const Sm80Problem<Scalar>& p)
      : p_(p),
        shared_(ptx::shared_memory<Shared>()),
        part_(threadIdx.x / 128),
        thread_(threadIdx.x % 128),
        lane_(threadIdx.x % kWarpSize),
        column_(blockIdx.x),
        first_token_(blockIdx.y * Config::TOKENS) {}

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int j = 0; j < Config::TOKENS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[j][i] = 0.f;
    const int tiles = ceil_div(p_.k_tiles - part_, Config::K_PARTS);
#pragma unroll
    for (int i = 0; i < Config::STAGES - 1; ++i) {
      if (i < tiles) fetch(i);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      ptx::cp_async_wait<Config::STAGES - 2>();
      ptx::named_sync(1 + part_, 128);  // stage i has arrived, stage i - 1 has been read
      if (i + Config::STAGES - 1 < tiles) fetch(i + Config::STAGES - 1);
      ptx::cp_async_commit();
      multiply(shared_.ring[part_][i % Config::STAGES]);
    }
    ptx::cp_async_wait<0>();
    ptx::block_sync();  // all rings have been read: their place takes the sums
    write();
  }

 private:
  // Tile i of this group into its stage.
  __device__ __forceinline__ void fetch(int i) {
    Stage& stage = shared_.ring[part_][i % Config::STAGES];
    const int k_tile = part_ + i * Config::K_PARTS;
    const uint8_t* source =
        p_.weights + (static_cast<long long>(column_) * p_.k_tiles + k_tile) * Config::TILE_BYTES;
    for (int at = thread_ * 16; at < Config::TILE_BYTES; at += 128 * 16)
      ptx::cp_async_16(stage.weights + at, source + at, 16);
    constexpr int kChunks = kTileK / 8;  // of 16 bytes, of a row
#pragma unroll
    for (int item = thread_; item < Config::TOKENS * kChunks; item += 128) {
      const int token = item / kChunks;
      const int k = k_tile * kTileK + item % kChunks * 8;
      const bool exists = first_token_ + token < p_.m && k < p_.k;
      const Scalar* row =
          p_.activations + (exists ? (first_token_ + token) * p_.row_stride + k : 0);
      ptx::cp_async_16(&stage.tokens[token][item % kChunks * 8], row,
                       exists ? 2 * min(8, p_.k - k) : 0);
    }
  }

  __device__ __forceinline__ void multiply(const Stage& stage) {
    uint32_t words[kSteps][Config::STEP_WORDS];
    uint32_t positions[2];
    load_codes<Config>(words, positions, stage.weights, thread_);
    uint32_t scales[2];
    if constexpr (Config::GROUPED) {
      const __half2 pair = tile_scales(stage.weights + Config::CODE_BYTES + kPositionBytes,
                                       thread_ / kWarpSize, lane_);
      scales[0] = scale_pair(pair.x, Scalar());
      scales[1] = scale_pair(pair.y, Scalar());
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4];
      codes_to_fragment(a, words[s], Scalar());
      if constexpr (Config::GROUPED) scale_fragment<Scalar>(a, scales);
#pragma unroll
      for (int j = 0; j < Config::TOKENS / 8; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, &stage.tokens[j * 8 + lane_ % 8][s * 32 + lane_ / 8 * 8]);
        if (s % 2 == 0)
          ptx::mma_sp_m16n8k32<0>(sums_[j], a, b, positions[s / 2], Scalar());
        else
          ptx::mma_sp_m16n8k32<1>(sums_[j], a, b, positions[s / 2], Scalar());
      }
    }
  }

  // Add the groups' sums and write the block's outputs, neighbouring features by neighbouring
  // threads.
  __device__ __forceinline__ void write() {
    const int row = thread_ / kWarpSize * 16 + lane_ / 4;
#pragma unroll
    for (int j = 0; j < Config::TOKENS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        shared_.partial[part_][row + i / 2 * 8][j * 8 + lane_ % 4 * 2 + i % 2] = sums_[j][i];
    ptx::block_sync();
    const int f = threadIdx.x % kTileN;
    const int n = column_ * kTileN + f;
    if (n >= p_.n) return;
    const float scale = Config::GROUPED ? 1.f : __half2float(p_.scales[n]);
    const float shift = p_.bias != nullptr ? Element<Scalar>::to_float(p_.bias[n]) : 0.f;
    const int tokens = min(Config::TOKENS, p_.m - first_token_);
    for (int t = threadIdx.x / kTileN; t < tokens; t += Config::THREADS / kTileN) {
      float sum = 0.f;
#pragma unroll
      for (int part = 0; part < Config::K_PARTS; ++part) sum += shared_.partial[part][f][t];
      p_.out[static_cast<long long>(first_token_ + t) * p_.n + n] =
          Element<Scalar>::from_float(sum * scale + shift);
    }
  }

  const Sm80Problem<Scalar>& p_;
  Shared& shared_;
  const int part_;    // group of four warps
  const int thread_;  // in the group
  const int lane_;
  const int column_;  // feature tile
  const int first_token_;
  float sums_[Config::TOKENS / 8][4];
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS)
    sm80_kernel(const __grid_constant__ Sm80Problem<typename Config::Scalar> problem) {
  static_assert(sizeof(Sm80Storage<Config>) == Config::STORAGE_BYTES,
                "the host's formula for shared memory must agree with the struct");
  Sm80Kernel<Config>(problem).run();
}

}  // namespace sparse
