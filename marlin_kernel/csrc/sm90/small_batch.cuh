// Small batches: one pass over the weights at memory speed. What such kernels share.
//
// Blocks are persistent: each loads the activations of its part of k once, and walks over columns
// of 64 features. Warps of a block share the k range of a column; each has a private ring of bulk
// copies of weight tiles, which runs on from column to column and is filled before anything else
// happens and before the preceding kernel has ended (weights do not depend on it). Nothing
// synchronises warps until their sums of a column are complete; those are added in a fixed order,
// first within the block, then, pushed through distributed shared memory, over the cluster that
// shares the column's k range. The split depends on K and N alone.
//
// A kernel derives from SmallBatch<Config, itself> and has
//   enter_column()            cursor_ came to a column: find its weights
//   fetch_tile(target, full)  copies of the tile at cursor_, STAGE_BYTES in all
//   load(...)                 activations to shared memory; the arguments of run()
//   multiply(exists)          total_: sums of this warp's run of a column
//   column_scale(n)           what sums of feature n are multiplied by in the end
// and a Config with SmallBatchShape, Scalar, TILE_K (k of a weight tile) and STAGE_BYTES.
#pragma once

#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared_memory.cuh"
#include "sm90/problem.cuh"

namespace sm90 {

template <int TOKEN_TILES_,    // tokens / 8 that one block multiplies
          int WARPS_N_,        // warps side by side: 64 features each
          int WARPS_K_,        // warps that share those features' k range
          int SPLIT_,          // blocks of a cluster that share it further
          int STAGES_,         // tiles in flight per warp
          int BLOCKS_PER_SM_,  // blocks that the registers must leave room for
          int STORAGE_BYTES_>  // sizeof(SmallBatchStorage), as the host computes it
struct SmallBatchShape {
  static constexpr int TOKEN_TILES = TOKEN_TILES_;
  static constexpr int WARPS_N = WARPS_N_;
  static constexpr int WARPS_K = WARPS_K_;
  static constexpr int SPLIT = SPLIT_;
  static constexpr int STAGES = STAGES_;
  static constexpr int BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr int STORAGE_BYTES = STORAGE_BYTES_;
  static constexpr bool GATHERS = false;

  static constexpr int TOKENS = 8 * TOKEN_TILES;
  static constexpr int WARPS = WARPS_N * WARPS_K;
  static constexpr int THREADS = WARPS * kWarpSize;
  static constexpr int FEATURES = WARPS_N * kTileN;
  static constexpr int FEATURES_PER_RANK = FEATURES / SPLIT;

  static_assert(SPLIT == 1 || SPLIT == 2 || SPLIT == 4 || SPLIT == 8,
                "a portable cluster has at most 8 blocks; the reduction halves evenly");
};

// Dynamic shared memory; the activations [m][k range of the block + 8] follow it. If they are
// gathered: [m][K' + 8], and the index of the block's k range, 2 bytes each.
template <class Config>
struct SmallBatchStorage {
  alignas(128) uint8_t ring[Config::WARPS][Config::STAGES * Config::STAGE_BYTES];
  alignas(16) float partial[Config::WARPS][kTileN * Config::TOKENS];  // sums of each warp
  // Those of the block, pushed by the blocks of the cluster: [source][feature of this rank][token].
  // Two places, so that the next column's may arrive while these are read.
  alignas(16) float received[Config::SPLIT > 1 ? 2 : 1][Config::SPLIT][Config::FEATURES_PER_RANK]
                            [Config::TOKENS];
  alignas(16) uint64_t full[Config::WARPS][Config::STAGES];
  alignas(16) uint64_t tokens_full[Config::WARPS_K];  // activations of a run of k have arrived
};

template <class Config, class Kernel>
class SmallBatch {
 protected:
  using Scalar = typename Config::Scalar;
  using Storage = SmallBatchStorage<Config>;
  static_assert(sizeof(Storage) == Config::STORAGE_BYTES,
                "the host's formula for shared memory must agree with the struct");
  using Accumulators = float[4][Config::TOKEN_TILES][4];  // [16 features][8 tokens][fragment]

  __device__ __forceinline__ explicit SmallBatch(const Problem<Scalar>& p)
      : p_(p),
        shared_(ptx::shared_memory<Storage>()),
        activations_(reinterpret_cast<uint8_t*>(&shared_ + 1)),
        warp_(ptx::warp_uniform(threadIdx.x / kWarpSize)),
        lane_(threadIdx.x % kWarpSize),
        rank_(Config::SPLIT > 1 ? static_cast<int>(blockIdx.x) : 0),
        block_range_(p.k_tiles, rank_, Config::SPLIT),
        cursor_{static_cast<int>(blockIdx.y) * Config::WARPS_N + warp_ % Config::WARPS_N} {
    const Range mine(block_range_.size(), warp_ / Config::WARPS_N, Config::WARPS_K);
    first_tile_ = block_range_.begin + mine.begin;
    tiles_ = mine.size();
    const int row_tiles = Config::GATHERS ? p.k_tiles : block_range_.size();
    row_bytes_ = row_tiles * Config::TILE_K * static_cast<int>(sizeof(Scalar)) + 16;
  }

 public:
  template <class... Arguments>
  __device__ __forceinline__ void run(Arguments... arguments) {
    start_pipeline();
    ptx::launch_dependents();
    if constexpr (Config::SPLIT > 1) ptx::cluster_arrive();
    ptx::block_sync();  // barriers of activations are initialised
    kernel().load(arguments...);
    const int blocks = ceil_div(p_.column_tiles, Config::WARPS_N);
    int parity = 0;  // of the place of sums from the cluster
    for (int block = blockIdx.y; block < blocks; block += gridDim.y) {
      load_epilogue_operands(block);
      if (block == blockIdx.y) wait_for_activations();
      kernel().multiply(block * Config::WARPS_N + warp_ % Config::WARPS_N < p_.column_tiles);
      add_warps(parity, block == blockIdx.y);
      write_output(parity, block);
      if constexpr (Config::SPLIT > 1) parity ^= 1;
    }
  }

 protected:
  __device__ __forceinline__ Kernel& kernel() { return static_cast<Kernel&>(*this); }

  // ---- weights: private ring of this warp ----
  // The next tile to fetch: of a column, and of this warp's run of k.
  struct Cursor {
    int column;
    int tile = 0;
  };

  __device__ __forceinline__ bool fetches() const { return cursor_.column < p_.column_tiles; }

  // Fetch the next tile into `stage`; all lanes take part.
  __device__ __forceinline__ void fetch(int stage) {
    if (ptx::elect_one()) {
      uint64_t* full = &shared_.full[warp_][stage];
      ptx::mbarrier_arrive_expect(full, Config::STAGE_BYTES);
      kernel().fetch_tile(shared_.ring[warp_] + stage * Config::STAGE_BYTES, full);
    }
    if (++cursor_.tile == tiles_) {
      cursor_.tile = 0;
      cursor_.column += static_cast<int>(gridDim.y) * Config::WARPS_N;
      if (fetches()) kernel().enter_column();
    }
  }

  __device__ __forceinline__ void start_pipeline() {
    if (ptx::elect_one()) {
#pragma unroll
      for (int stage = 0; stage < Config::STAGES; ++stage)
        ptx::mbarrier_init(&shared_.full[warp_][stage], 1);
      if constexpr (Config::GATHERS) {
        if (warp_ == 0) ptx::mbarrier_init(&shared_.tokens_full[0], Config::WARPS);
      } else if (warp_ % Config::WARPS_N == 0) {
        ptx::mbarrier_init(&shared_.tokens_full[warp_ / Config::WARPS_N], Config::WARPS_N);
      }
      ptx::fence_mbarrier_init();
    }
    ptx::warp_sync();
    if (tiles_ == 0) cursor_.column = p_.column_tiles;  // fewer tiles along k than warps
    if (fetches()) kernel().enter_column();
#pragma unroll 1
    for (int stage = 0; stage < Config::STAGES && fetches(); ++stage) fetch(stage);
  }

  // The stage that was multiplied is free: fetch into it and turn to the next.
  __device__ __forceinline__ void advance() {
    ptx::warp_sync();
    if (fetches()) fetch(stage_);
    if (++stage_ == Config::STAGES) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  // ---- activations: the block's k range of every token, rows padded by 16 bytes against bank
  // conflicts. Warps that share a k run fetch its tokens in turn, all copies in flight at once.
  __device__ __forceinline__ void load_activations() {
    const unsigned long long address = reinterpret_cast<unsigned long long>(p_.activations);
    const unsigned long long stride = p_.row_stride * sizeof(Scalar);
    const bool aligned = (address | (p_.m > 1 ? stride : 0) | p_.k * sizeof(Scalar)) % 16 == 0;
    const int run = warp_ / Config::WARPS_N;
    const int first_k = first_tile_ * Config::TILE_K;
    const int wanted = tiles_ * Config::TILE_K;
    const int there = min(max(p_.k - first_k, 0), wanted);
    uint8_t* target = activations_ + (first_k - block_range_.begin * Config::TILE_K) *
                                         static_cast<int>(sizeof(Scalar));
    if (aligned && wanted > 0 && first_k + wanted <= p_.k) {
      ptx::wait_for_predecessors();
      if (ptx::elect_one()) {
        const int bytes = wanted * static_cast<int>(sizeof(Scalar));
        const int rows = ceil_div(p_.m - warp_ % Config::WARPS_N, Config::WARPS_N);
        ptx::mbarrier_arrive_expect(&shared_.tokens_full[run], rows * bytes);
        for (int token = warp_ % Config::WARPS_N; token < p_.m; token += Config::WARPS_N)
          ptx::bulk_copy(target + token * row_bytes_,
                         p_.activations + token * p_.row_stride + first_k, bytes,
                         &shared_.tokens_full[run]);
      }
      return;
    }
    // Odd addresses, or a run that reaches into the padding of K.
    ptx::wait_for_predecessors();
    for (int token = warp_ % Config::WARPS_N; token < p_.m; token += Config::WARPS_N)
      for (int i = lane_; i < wanted; i += kWarpSize)
        reinterpret_cast<Scalar*>(target + token * row_bytes_)[i] =
            i < there ? p_.activations[token * p_.row_stride + first_k + i]
                      : Element<Scalar>::from_float(0.f);
    ptx::warp_sync();
    if (ptx::elect_one()) ptx::mbarrier_arrive(&shared_.tokens_full[run]);
  }

  __device__ __forceinline__ void wait_for_activations() {
    if constexpr (Config::GATHERS) {
      ptx::mbarrier_wait(&shared_.tokens_full[0], 0);
    } else {
      ptx::mbarrier_wait(&shared_.tokens_full[warp_ / Config::WARPS_N], 0);
    }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) total_[m][t][i] = 0.f;
  }

  // ---- reduction and output ----
  // Leave this warp's sums in shared memory ([64 features][tokens]), add those of the warps that
  // share a column in order of k, and hand each feature to the rank of the cluster that writes it.
  __device__ __forceinline__ void add_warps(int parity, bool first) {
    float* mine = shared_.partial[warp_];
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int feature = m * 16 + h * 8 + lane_ / 4;
          *reinterpret_cast<float2*>(mine + feature * Config::TOKENS + t * 8 + lane_ % 4 * 2) =
              make_float2(total_[m][t][2 * h], total_[m][t][2 * h + 1]);
        }
    ptx::block_sync();
    if constexpr (Config::SPLIT > 1)
      if (first) ptx::cluster_wait();  // every block of the cluster has started

    constexpr int kQuads = Config::TOKENS / 4;
    constexpr int kItems = Config::FEATURES * kQuads;
#pragma unroll
    for (int item = threadIdx.x; item < kItems; item += Config::THREADS) {
      const int feature = item / kQuads;
      const int quad = item % kQuads;
      if (quad * 4 >= p_.m) continue;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int wk = 0; wk < Config::WARPS_K; ++wk) {
        const float* sums = shared_.partial[wk * Config::WARPS_N + feature / kTileN];
        const float4 part =
            reinterpret_cast<const float4*>(sums)[feature % kTileN * kQuads + quad];
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      const int owner = feature / Config::FEATURES_PER_RANK;
      float* target =
          &shared_.received[parity][rank_][feature % Config::FEATURES_PER_RANK][quad * 4];
      if constexpr (Config::SPLIT > 1)
        ptx::store_remote(target, owner, sum);
      else
        *reinterpret_cast<float4*>(target) = sum;
    }
    if constexpr (Config::SPLIT > 1) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    } else {
      ptx::block_sync();
    }
  }

  static constexpr int kOutThreads =
      Config::THREADS < Config::FEATURES_PER_RANK ? Config::THREADS : Config::FEATURES_PER_RANK;
  static constexpr int kOutFeatures = Config::FEATURES_PER_RANK / kOutThreads;  // of one thread

  __device__ __forceinline__ int out_feature(int i) const {
    return rank_ * Config::FEATURES_PER_RANK + i * kOutThreads + threadIdx.x % kOutThreads;
  }

  // Bias and final factors of the features that this thread will write: fetched while weights
  // stream.
  __device__ __forceinline__ void load_epilogue_operands(int block) {
#pragma unroll
    for (int i = 0; i < kOutFeatures; ++i) {
      const int n = block * Config::FEATURES + out_feature(i);
      bias_[i] = p_.bias != nullptr && n < p_.n ? Element<Scalar>::to_float(p_.bias[n]) : 0.f;
      scale_[i] = kernel().column_scale(n);
    }
  }

  __device__ __forceinline__ void write_output(int parity, int block) {
#pragma unroll
    for (int i = 0; i < kOutFeatures; ++i) {
      const int feature = i * kOutThreads + threadIdx.x % kOutThreads;
      const int n = block * Config::FEATURES + out_feature(i);
      if (n >= p_.n) continue;
      for (int token = threadIdx.x / kOutThreads; token < p_.m;
           token += Config::THREADS / kOutThreads) {
        float sum = 0.f;
#pragma unroll
        for (int source = 0; source < Config::SPLIT; ++source)
          sum += shared_.received[parity][source][feature][token];
        p_.out[static_cast<long long>(token) * p_.n + n] =
            Element<Scalar>::from_float(sum * scale_[i] + bias_[i]);
      }
    }
  }

  const Problem<Scalar>& p_;
  Storage& shared_;
  uint8_t* const activations_;  // [m][row_bytes_], and the index if they are gathered
  const int warp_;
  const int lane_;
  const int rank_;           // in the cluster
  const Range block_range_;  // k tiles of this block
  int first_tile_;           // first k tile of this warp
  int tiles_;                // number of them
  int row_bytes_;            // between tokens in shared memory
  Cursor cursor_;            // next tile to fetch
  int stage_ = 0;            // next stage to multiply
  uint32_t parity_ = 0;      // of its barrier
  Accumulators total_;
  float bias_[kOutFeatures];
  float scale_[kOutFeatures];
};

}  // namespace sm90
