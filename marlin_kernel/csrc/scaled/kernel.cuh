// Scaled GEMM of 8-bit operands by wgmma (sm_90a), dense or 2:4 sparse; see config.cuh.
//
// A ring of stages (128 k each) is fed by tensor copies of weights and tokens and by bulk copies of
// the metadata. One warp feeds; each of GROUPS warpgroups multiplies its 64 features with all
// tokens of the stage, straight from shared memory. Blocks are persistent and walk over tiles.
// With MULTICAST each block of a cluster works on other features and fetches its share of the
// tokens for all of them: tokens are three quarters of what a stage moves. With SPLIT the blocks of
// a cluster share the k range of a tile and add their sums through distributed shared memory, in
// order of k.
#pragma once

#include "common/copy_rows.cuh"
#include "common/ring.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tensor_copy.cuh"
#include "scaled/config.cuh"

namespace scaled {

// Tensor maps of the operands: b [n, k bytes], boxes of FEATURES rows; a [m, k bytes], boxes of
// TOKENS / MULTICAST rows.
struct Maps {
  TensorMap weights;
  TensorMap tokens;
};

// The tiles of this block, in bands of kBand token tiles, so that blocks running at the same time
// share weights and tokens. With MULTICAST a cluster takes neighbouring feature tiles.
template <class Config>
struct Walk {
  static constexpr int kBand = 8;
  int tile, tiles, column_steps, token_blocks, clusters;
  int rank;  // in the cluster

  template <class Problem>
  __device__ __forceinline__ explicit Walk(const Problem& p)
      : tile(static_cast<int>(blockIdx.x) / Config::CLUSTER),
        column_steps(ceil_div(p.n, Config::FEATURES * Config::MULTICAST)),
        token_blocks(ceil_div(p.m, Config::TOKENS)),
        clusters(static_cast<int>(gridDim.x) / Config::CLUSTER),
        rank(Config::CLUSTER == 1 ? 0 : static_cast<int>(ptx::cluster_rank())) {
    tiles = column_steps * token_blocks;
  }
  __device__ __forceinline__ bool done() const { return tile >= tiles; }
  __device__ __forceinline__ void next() { tile += clusters; }
  __device__ __forceinline__ void place(int& feature, int& token) const {
    const int band = tile / (kBand * column_steps);
    const int in_band = tile - band * kBand * column_steps;
    const int height = min(kBand, token_blocks - band * kBand);
    const int column = in_band / height;
    token = (band * kBand + in_band % height) * Config::TOKENS;
    feature = (Config::MULTICAST == 1 ? column : column * Config::MULTICAST + rank) *
              Config::FEATURES;
  }
  // Stages of this block's part of the k range.
  template <class Problem>
  __device__ __forceinline__ int k_begin(const Problem& p) const {
    return Config::SPLIT == 1 ? 0 : p.k_tiles * rank / Config::SPLIT;
  }
  template <class Problem>
  __device__ __forceinline__ int k_end(const Problem& p) const {
    return Config::SPLIT == 1 ? p.k_tiles : p.k_tiles * (rank + 1) / Config::SPLIT;
  }
};

// ---- copies into the ring: one warp; one of its lanes issues them ----
template <class Config>
class Feeder {
  using Shared = Storage<Config>;
  using Task = Problem<typename Config::Out>;

  // The next stage to fetch.
  struct Cursor {
    Walk<Config> walk;
    int k = 0, k_end = 0, feature = 0, token = 0;
    __device__ __forceinline__ void enter(const Task& p) {
      if (walk.done()) return;
      walk.place(feature, token);
      k = walk.k_begin(p);
      k_end = walk.k_end(p);
    }
    __device__ __forceinline__ void advance(const Task& p) {
      if (++k >= k_end) {
        walk.next();
        enter(p);
      }
    }
  };

 public:
  __device__ __forceinline__ Feeder(const Task& p, const Maps* maps)
      : p_(p), maps_(maps), shared_(ptx::shared_memory<Shared>()), cursor_{Walk<Config>(p)} {}

  __device__ __forceinline__ void run() {
    cursor_.enter(p_);
    ptx::wait_for_predecessors();  // weights too: the caller may have written them just now
    // The first round finds the ring empty.
#pragma unroll 1
    for (int stage = 0; stage < Config::STAGES && !cursor_.walk.done(); ++stage) {
      if (ptx::elect_one()) fetch(stage);
      cursor_.advance(p_);
    }
    common::RingPosition<Config::STAGES> position;
#pragma unroll 1
    for (; !cursor_.walk.done(); cursor_.advance(p_), position.advance()) {
      ptx::mbarrier_wait(&shared_.empty[position.stage], position.parity);
      if (ptx::elect_one()) fetch(position.stage);
    }
  }

 private:
  __device__ __forceinline__ void fetch(int stage) {
    fetch_weights(stage);
    fetch_tokens(stage);
  }

  // Also announces the bytes of the whole stage.
  __device__ __forceinline__ void fetch_weights(int stage) {
    uint64_t* full = &shared_.full[stage];
    ptx::mbarrier_arrive_expect(full, Config::STAGE_BYTES);
    ptx::byte_tensor_copy(shared_.ring.weights[stage], &maps_->weights,
                          cursor_.k * Config::WEIGHT_ROW, cursor_.feature, full);
    if constexpr (Config::SPARSE) {
      const int first = cursor_.feature / kGroupFeatures;
#pragma unroll
      for (int g = 0; g < Config::GROUPS; ++g) {
        const long long tile = min(first + g, p_.feature_tiles - 1);  // beyond: any valid positions
        ptx::bulk_copy(shared_.ring.metadata[stage] + g * kMetadataBytes,
                       p_.metadata + (tile * p_.k_tiles + cursor_.k) * kMetadataBytes,
                       kMetadataBytes, full);
      }
    }
  }

  __device__ __forceinline__ void fetch_tokens(int stage) {
    uint64_t* full = &shared_.full[stage];
    if constexpr (Config::MULTICAST == 1) {
      ptx::byte_tensor_copy(shared_.ring.tokens[stage], &maps_->tokens, cursor_.k * kStageK,
                            cursor_.token, full);
    } else {
      constexpr int kShare = Config::TOKENS / Config::MULTICAST;
      const int first = cursor_.walk.rank * kShare;
      ptx::byte_tensor_multicast(shared_.ring.tokens[stage] + first * kStageK, &maps_->tokens,
                                 cursor_.k * kStageK, cursor_.token + first, full,
                                 (1 << Config::MULTICAST) - 1);
    }
  }

  const Task& p_;
  const Maps* maps_;
  Shared& shared_;
  Cursor cursor_;
};

// ---- the warpgroups that multiply ----
template <class Config>
class Consumer {
  using Shared = Storage<Config>;
  using Out = typename Config::Out;
  using Pair = typename Element<Out>::Pair;
  using Sum = typename Config::Sum;
  using Mma = ptx::Wgmma8bit<Config::TOKENS, typename Config::Operand, Config::SPARSE>;
  static constexpr int SUMS = Config::SUMS;
  static constexpr int kOwnTokens = ceil_div(Config::TOKENS, kWarpgroupThreads);

 public:
  __device__ __forceinline__ explicit Consumer(const Problem<Out>& p)
      : p_(p),
        shared_(ptx::shared_memory<Shared>()),
        group_(ptx::warp_uniform(threadIdx.x / kWarpgroupThreads)),
        warp_(ptx::warp_uniform(threadIdx.x / kWarpSize % 4)),
        lane_(threadIdx.x % kWarpSize) {}

  __device__ __forceinline__ void run() {
    ptx::wait_for_predecessors();  // scales, and what is overwritten
    for (Walk<Config> walk(p_); !walk.done(); walk.next()) {
      int feature, token;
      walk.place(feature, token);
      load_scales(token);
      multiply(walk.k_end(p_) - walk.k_begin(p_));
      store_scales();
      if constexpr (Config::SPLIT > 1)
        add_cluster(walk.rank, feature, token);
      else
        write_tile(feature, token);
    }
  }

 private:
  // Scales of this tile's tokens: under way while the tile is multiplied, then in this warpgroup's
  // own copy in shared memory.
  __device__ __forceinline__ void load_scales(int token) {
    for_own_tokens([&](int i, int own) {
      scales_[own] = token + i < p_.m
                         ? p_.scale_a[static_cast<long long>(token + i) * p_.scale_a_stride]
                         : 0.f;
    });
  }
  __device__ __forceinline__ void store_scales() {
    for_own_tokens([&](int i, int own) { shared_.scale_a[group_][i] = scales_[own]; });
  }
  template <class Body>
  __device__ __forceinline__ void for_own_tokens(Body body) {
#pragma unroll
    for (int own = 0; own < kOwnTokens; ++own) {
      const int i = own * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads;
      if (Config::TOKENS % kWarpgroupThreads == 0 || i < Config::TOKENS) body(i, own);
    }
  }

  __device__ __forceinline__ void multiply(int tiles) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums_[i] = 0;
    int i = 0;
#pragma unroll 1
    for (; i + 1 < tiles; i += 2) {
      multiply_stage<0>(i);
      multiply_stage<1>(i + 1);
    }
    if (i < tiles) multiply_stage<0>(i);
    ptx::wgmma_wait<0>();
    if (tiles > 0) release(previous_);
#pragma unroll
    for (int s = 0; s < SUMS; ++s) ptx::pin_registers_8bit(sums_[s]);
  }

  // Stage i of the tile; BUFFER alternates, because metadata registers are read until the
  // instruction has completed.
  template <int BUFFER>
  __device__ __forceinline__ void multiply_stage(int i) {
    const int stage = position_.stage;
    ptx::mbarrier_wait(&shared_.full[stage], position_.parity);
    position_.advance();
    const uint64_t weights = ptx::swizzled_descriptor<Config::WEIGHT_ROW>(
        shared_.ring.weights[stage] + group_ * kGroupFeatures * Config::WEIGHT_ROW);
    const uint64_t tokens = ptx::swizzled_descriptor<kStageK>(shared_.ring.tokens[stage]);
    if constexpr (Config::SPARSE) {
      const uint2 words = *reinterpret_cast<const uint2*>(
          shared_.ring.metadata[stage] + group_ * kMetadataBytes +
          threadIdx.x % kWarpgroupThreads * 8);
      metadata_[BUFFER][0] = words.x;
      metadata_[BUFFER][1] = words.y;
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < Config::STEPS; ++s) {
      constexpr int kWeightStep = Config::WEIGHT_ROW / Config::STEPS;  // bytes
      constexpr int kTokenStep = kStageK / Config::STEPS;
      Mma::mma(sums_, weights + s * (kWeightStep >> 4), tokens + s * (kTokenStep >> 4),
               Config::SPARSE ? metadata_[BUFFER][s % 2] : 0, 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the stage before has been read
    if (i > 0) release(previous_);
    previous_ = stage;
  }

  // Lane 0 speaks for its warp, whose warp-wide products that read the stage have completed.
  __device__ __forceinline__ void release(int stage) {
    if constexpr (Config::MULTICAST == 1) {
      if (lane_ == 0) ptx::mbarrier_arrive(&shared_.empty[stage]);
    } else {
      if (lane_ < Config::MULTICAST)
        ptx::mbarrier_arrive_remote(&shared_.empty[stage], lane_);
    }
  }

  // ---- output ----
  __device__ __forceinline__ float feature_scale(int n) const {
    return n < p_.n ? p_.scale_b[static_cast<long long>(n) * p_.scale_b_stride] : 0.f;
  }
  __device__ __forceinline__ float bias(int n) const {
    return p_.bias != nullptr && n < p_.n ? Element<Out>::to_float(p_.bias[n]) : 0.f;
  }
  // One rounding a product, and no contraction to a fused multiply-add: equal to the reference.
  static __device__ __forceinline__ float scaled_sum(Sum sum, float scale_b, float scale_a,
                                                     float bias) {
    return __fadd_rn(__fmul_rn(__fmul_rn(static_cast<float>(sum), scale_b), scale_a), bias);
  }

  __device__ __forceinline__ void write_tile(int feature, int token) {
    auto& out = (*reinterpret_cast<typename Shared::Out*>(shared_.out))[group_];
    const int first = feature + group_ * kGroupFeatures;
    const int n = first + warp_ * 16 + lane_ / 4;
    const float scale[2] = {feature_scale(n), feature_scale(n + 8)};
    const float shift[2] = {bias(n), bias(n + 8)};
#pragma unroll
    for (int chunk = 0; chunk < Config::TOKENS / Config::OUT_TOKENS; ++chunk) {
      // All have stored their scales, and copied the chunk before.
      ptx::named_sync(1 + group_, kWarpgroupThreads);
#pragma unroll
      for (int j = 0; j < Config::OUT_TOKENS / 8; ++j) {
        const int column = chunk * Config::OUT_TOKENS + 8 * j;
        const float2 factor =
            *reinterpret_cast<const float2*>(&shared_.scale_a[group_][column + lane_ % 4 * 2]);
        uint32_t packed[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = column / 2 + 2 * h;
          Pair pair;
          pair.x = Element<Out>::from_float(scaled_sum(sums_[at], scale[h], factor.x, shift[h]));
          pair.y =
              Element<Out>::from_float(scaled_sum(sums_[at + 1], scale[h], factor.y, shift[h]));
          packed[h] = *reinterpret_cast<const uint32_t*>(&pair);
        }
        ptx::stmatrix_x2_transposed(&out[j * 8 + lane_ % 8][warp_ * 16 + lane_ / 8 % 2 * 8],
                                    packed[0], packed[1]);
      }
      ptx::named_sync(1 + group_, kWarpgroupThreads);
      common::copy_rows<kGroupFeatures, kWarpgroupThreads>(
          out, p_.out, p_.m, p_.n, token + chunk * Config::OUT_TOKENS, first,
          threadIdx.x % kWarpgroupThreads);
    }
    ptx::named_sync(1 + group_, kWarpgroupThreads);  // before scales or output are overwritten
  }

  static __device__ __forceinline__ uint32_t bits(Sum v) {
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ __forceinline__ Sum value(float v) {
    return *reinterpret_cast<const Sum*>(&v);
  }

  // Each rank of the cluster leaves its sums where its ring was; then each adds one share of the
  // features over all ranks, and writes them.
  __device__ __forceinline__ void add_cluster(int rank, int feature, int token) {
    using Partial = typename Shared::Partial;
    Partial& partial = *reinterpret_cast<Partial*>(&shared_.ring);
    ptx::named_sync(1, Config::CONSUMERS);  // all warps have read the ring to its end
    const int tokens = min(Config::TOKENS, p_.m - token);
    const int row = group_ * kGroupFeatures + warp_ * 16 + lane_ / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < Config::TOKENS / 8; ++j)
        *reinterpret_cast<uint2*>(&partial[row + 8 * h][j * 8 + lane_ % 4 * 2]) =
            make_uint2(bits(sums_[4 * j + 2 * h]), bits(sums_[4 * j + 2 * h + 1]));
    ptx::cluster_arrive();

    constexpr int kFeatures = Config::FEATURES / Config::SPLIT;
    constexpr int kAtOnce = Config::CONSUMERS / kFeatures;  // groups of four tokens
    const int f = rank * kFeatures + threadIdx.x % kFeatures;
    const int n = feature + f;
    const float scale = feature_scale(n);
    const float shift = bias(n);
    Out* out = p_.out + static_cast<long long>(token) * p_.n + n;
    ptx::cluster_wait();
    if (n < p_.n) {
#pragma unroll 1
      for (int at = threadIdx.x / kFeatures * 4; at < tokens; at += kAtOnce * 4) {
        Sum sums[4] = {0, 0, 0, 0};
#pragma unroll
        for (int source = 0; source < Config::SPLIT; ++source) {
          const float4 v = ptx::load_remote(&partial[f][at], source);
          sums[0] += value(v.x);
          sums[1] += value(v.y);
          sums[2] += value(v.z);
          sums[3] += value(v.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (at + i < tokens)
            out[static_cast<long long>(at + i) * p_.n] = Element<Out>::from_float(
                scaled_sum(sums[i], scale, shared_.scale_a[group_][at + i], shift));
      }
    }
  }

  const Problem<Out>& p_;
  Shared& shared_;
  const int group_;  // warpgroup
  const int warp_;   // in the warpgroup
  const int lane_;
  common::RingPosition<Config::STAGES> position_;
  int previous_ = 0;  // stage to be released
  float scales_[kOwnTokens];
  uint32_t metadata_[2][2];
  Sum sums_[SUMS];
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    scaled_kernel(const __grid_constant__ Problem<typename Config::Out> problem,
                  const __grid_constant__ Maps maps) {
  using Shared = Storage<Config>;
  static_assert(sizeof(Shared) == Config::STORAGE_BYTES,
                "the host's formula for shared memory must agree with the struct");
  Shared& shared = ptx::shared_memory<Shared>();
  const int warp = ptx::warp_uniform(threadIdx.x / kWarpSize);
  constexpr int kFeedingWarp = Config::CONSUMERS / kWarpSize;
  if (warp == kFeedingWarp && ptx::elect_one()) {
    ptx::prefetch_tensor_map(&maps.weights);
    ptx::prefetch_tensor_map(&maps.tokens);
    for (int stage = 0; stage < Config::STAGES; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp * Config::MULTICAST);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::block_sync();
  if constexpr (Config::MULTICAST > 1) {  // others write here: their barriers must exist
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  ptx::launch_dependents();
  if (warp >= kFeedingWarp) {
    ptx::release_registers<Config::FEEDER_REGISTERS>();
    if (warp == kFeedingWarp) Feeder<Config>(problem, &maps).run();
    if constexpr (Config::SPLIT > 1) {  // the consumers' barriers of add_cluster count everyone
      ptx::warp_sync();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  } else {
    ptx::acquire_registers<Config::CONSUMER_REGISTERS>();
    Consumer<Config>(problem).run();
  }
  if constexpr (Config::CLUSTER > 1) {  // no block may end while others use its shared memory
    ptx::warp_sync();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace scaled
