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

#include "common/ring.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tensor_copy.cuh"
#include "scaled/config.cuh"
#include "scaled/epilogue.cuh"
#include "scaled/walk.cuh"

namespace scaled {

// Tensor maps of the operands: b [n, k bytes], boxes of FEATURES rows; a [m, k bytes], boxes of
// TOKENS / MULTICAST rows.
struct Maps {
  TensorMap weights;
  TensorMap tokens;
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
class Consumer : Output<Config, Storage<Config>> {
  using Base = Output<Config, Storage<Config>>;
  using Out = typename Config::Out;
  using Sum = typename Config::Sum;
  using Mma = ptx::Wgmma8bit<Config::TOKENS, typename Config::Operand, Config::SPARSE>;
  static constexpr int SUMS = Config::SUMS;
  using Base::group_;
  using Base::lane_;
  using Base::p_;
  using Base::shared_;

 public:
  __device__ __forceinline__ explicit Consumer(const Problem<Out>& p) : Base(p) {}

  __device__ __forceinline__ void run() {
    ptx::wait_for_predecessors();  // scales, and what is overwritten
    for (Walk<Config> walk(p_); !walk.done(); walk.next()) {
      int feature, token;
      walk.place(feature, token);
      this->load_scales(token);
      multiply(walk.k_end(p_) - walk.k_begin(p_));
      this->store_scales();
      if constexpr (Config::SPLIT > 1)
        this->add_cluster(sums_, walk.rank, feature, token);
      else
        this->write_tile(sums_, feature, token);
    }
  }

 private:
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

  common::RingPosition<Config::STAGES> position_;
  int previous_ = 0;  // stage to be released
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
