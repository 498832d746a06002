// 2:4 Marlin kernel: FP16 or BF16 activations times sparse 4- or 8-bit weights by sparse wgmma, the
// weights as the register operand (sm_90a); see config.cuh.
//
// A ring of stages (128 k each) is fed by bulk copies of weight tiles and by tensor copies of
// activations, with the 128-byte swizzle. Each of GROUPS warpgroups turns the codes of its 64
// features into fragments of the kept values, two stages in turns, so that a stage is dequantized
// while the multiplications of the stage before are under way. Blocks are persistent and walk over
// tiles; with SPLIT the blocks of a cluster share the k range of one tile and add their sums
// through distributed shared memory, in order of k. Weights do not wait for the preceding kernel.
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
#include "ptx/wgmma_sparse.cuh"
#include "sparse/config.cuh"
#include "sparse/dequant.cuh"

namespace sparse {

// The tiles of this block, in bands of kBand token tiles, so that blocks running at the same time
// share weights and tokens.
template <class Config>
struct Walk {
  static constexpr int kBand = 8;
  int tile, tiles, columns, token_blocks, step;
  int rank;  // in the cluster: part of the k range

  template <class Problem>
  __device__ __forceinline__ explicit Walk(const Problem& p)
      : tile(static_cast<int>(blockIdx.x) / Config::SPLIT),
        columns(ceil_div(p.feature_tiles, Config::GROUPS)),
        token_blocks(ceil_div(p.m, Config::TOKENS)),
        step(static_cast<int>(gridDim.x) / Config::SPLIT),
        rank(Config::SPLIT == 1 ? 0 : static_cast<int>(ptx::cluster_rank())) {
    tiles = columns * token_blocks;
  }
  __device__ __forceinline__ bool done() const { return tile >= tiles; }
  __device__ __forceinline__ void next() { tile += step; }
  __device__ __forceinline__ void place(int& column, int& token) const {
    const int band = tile / (kBand * columns);
    const int in_band = tile - band * kBand * columns;
    const int height = min(kBand, token_blocks - band * kBand);
    column = in_band / height;
    token = (band * kBand + in_band % height) * Config::TOKENS;
  }
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
  using Task = Problem<typename Config::Scalar>;

  // The next stage to fetch.
  struct Cursor {
    Walk<Config> walk;
    int k = 0, k_end = 0, column = 0, token = 0;
    __device__ __forceinline__ void enter(const Task& p) {
      if (walk.done()) return;
      walk.place(column, token);
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
  __device__ __forceinline__ Feeder(const Task& p, const TensorMap* map)
      : p_(p), map_(map), shared_(ptx::shared_memory<Shared>()), cursor_{Walk<Config>(p)} {}

  __device__ __forceinline__ void run() {
    // The first round finds the ring empty: weights at once, tokens when the preceding kernel has
    // written them.
    cursor_.enter(p_);
    Cursor tokens = cursor_;
#pragma unroll 1
    for (int stage = 0; stage < Config::STAGES && !cursor_.walk.done(); ++stage) {
      if (ptx::elect_one()) fetch_weights(stage);
      cursor_.advance(p_);
    }
    ptx::wait_for_predecessors();
#pragma unroll 1
    for (int stage = 0; stage < Config::STAGES && !tokens.walk.done(); ++stage) {
      if (ptx::elect_one()) fetch_tokens(tokens, stage);
      tokens.advance(p_);
    }
    common::RingPosition<Config::STAGES> position;
#pragma unroll 1
    for (; !cursor_.walk.done(); cursor_.advance(p_), position.advance()) {
      ptx::mbarrier_wait(&shared_.empty[position.stage], position.parity);
      if (ptx::elect_one()) {
        fetch_weights(position.stage);
        fetch_tokens(cursor_, position.stage);
      }
    }
  }

 private:
  // Also announces the bytes of the whole stage.
  __device__ __forceinline__ void fetch_weights(int stage) {
    uint64_t* full = &shared_.full[stage];
    ptx::mbarrier_arrive_expect(full, Config::STAGE_BYTES);
#pragma unroll
    for (int g = 0; g < Config::GROUPS; ++g) {
      // Beyond the last column: any valid codes, whose products are not written.
      const long long column = min(cursor_.column * Config::GROUPS + g, p_.feature_tiles - 1);
      ptx::bulk_copy(shared_.ring.weights[stage][g],
                     p_.weights + (column * p_.k_tiles + cursor_.k) * Config::TILE_BYTES,
                     Config::TILE_BYTES, full);
    }
  }

  __device__ __forceinline__ void fetch_tokens(const Cursor& cursor, int stage) {
#pragma unroll
    for (int box = 0; box < 2; ++box)
      ptx::tensor_copy_2d(shared_.ring.tokens[stage][box], map_, cursor.k * kTileK + box * kBoxK,
                          cursor.token, &shared_.full[stage]);
  }

  const Task& p_;
  const TensorMap* map_;
  Shared& shared_;
  Cursor cursor_;
};

// ---- the warpgroups that multiply ----
template <class Config>
class Consumer {
  using Shared = Storage<Config>;
  using Scalar = typename Config::Scalar;
  using Pair = typename Element<Scalar>::Pair;
  using Mma = ptx::SparseWgmma<Config::TOKENS, Scalar>;
  static constexpr int SUMS = Config::SUMS;

 public:
  __device__ __forceinline__ explicit Consumer(const Problem<Scalar>& p)
      : p_(p),
        shared_(ptx::shared_memory<Shared>()),
        group_(ptx::warp_uniform(threadIdx.x / kWarpgroupThreads)),
        warp_(ptx::warp_uniform(threadIdx.x / kWarpSize % 4)),
        lane_(threadIdx.x % kWarpSize) {}

  __device__ __forceinline__ void run() {
    bool waited = false;
    for (Walk<Config> walk(p_); !walk.done(); walk.next()) {
      int column, token;
      walk.place(column, token);
      multiply(walk.k_end(p_) - walk.k_begin(p_));
      if (!waited) ptx::wait_for_predecessors();  // they may still read what is overwritten here
      waited = true;
      if constexpr (Config::SPLIT > 1)
        add_cluster(walk.rank, column * Config::FEATURES, token);
      else
        write_tile(column * Config::FEATURES, token);
    }
  }

 private:
  __device__ __forceinline__ void multiply(int tiles) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums_[i] = 0.f;
    int i = 0;
#pragma unroll 1
    for (; i + 1 < tiles; i += 2) {
      multiply_stage<0>(i);
      multiply_stage<1>(i + 1);
    }
    if (i < tiles) multiply_stage<0>(i);
    ptx::wgmma_wait<0>();
    if (tiles > 0) release(previous_);
    ptx::pin_registers(sums_);
  }

  // Stage i of the tile. BUFFER alternates: fragments and positions are read until the
  // instructions have completed.
  template <int BUFFER>
  __device__ __forceinline__ void multiply_stage(int i) {
    const int stage = position_.stage;
    ptx::mbarrier_wait(&shared_.full[stage], position_.parity);
    position_.advance();
    dequantize<BUFFER>(shared_.ring.weights[stage][group_]);
    ptx::wgmma_fence();
    multiply_step<BUFFER, 0>(stage);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the stage before has been read
    if (i > 0) release(previous_);
    previous_ = stage;
  }

  template <int BUFFER, int STEP>
  __device__ __forceinline__ void multiply_step(int stage) {
    if constexpr (STEP < kSteps) {
      const uint64_t tokens = ptx::wgmma_descriptor(shared_.ring.tokens[stage][STEP / 2]) +
                              STEP % 2 * ptx::kWgmmaStepK32;
      Mma::template mma<STEP % 2>(sums_, fragments_[BUFFER][STEP], tokens,
                                  positions_[BUFFER][STEP / 2]);
      multiply_step<BUFFER, STEP + 1>(stage);
    }
  }

  // This thread's codes of a tile to fragments, with their scales if they have groups.
  template <int BUFFER>
  __device__ __forceinline__ void dequantize(const uint8_t* tile) {
    uint32_t words[kSteps][Config::STEP_WORDS];
    load_codes<Config>(words, positions_[BUFFER], tile, threadIdx.x % kWarpgroupThreads);
    uint32_t scales[2];
    if constexpr (Config::GROUPED) {
      const __half2 pair = tile_scales(tile + Config::CODE_BYTES + kPositionBytes, warp_, lane_);
      scales[0] = scale_pair(pair.x, Scalar());
      scales[1] = scale_pair(pair.y, Scalar());
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      codes_to_fragment(fragments_[BUFFER][s], words[s], Scalar());
      if constexpr (Config::GROUPED) scale_fragment<Scalar>(fragments_[BUFFER][s], scales);
    }
  }

  // Lane 0 speaks for its warp, whose warp-wide products that read the stage have completed.
  __device__ __forceinline__ void release(int stage) {
    if (lane_ == 0) ptx::mbarrier_arrive(&shared_.empty[stage]);
  }

  // ---- output ----
  __device__ __forceinline__ float column_scale(int n) const {
    if constexpr (Config::GROUPED) return 1.f;
    return n < p_.n ? __half2float(p_.scales[n]) : 0.f;
  }
  __device__ __forceinline__ float bias(int n) const {
    return p_.bias != nullptr && n < p_.n ? Element<Scalar>::to_float(p_.bias[n]) : 0.f;
  }

  __device__ __forceinline__ void write_tile(int feature, int token) {
    auto& out = (*reinterpret_cast<typename Shared::Out*>(shared_.out))[group_];
    const int first = feature + group_ * kTileN;
    const int n = first + warp_ * 16 + lane_ / 4;
    const float scale[2] = {column_scale(n), column_scale(n + 8)};
    const float shift[2] = {bias(n), bias(n + 8)};
#pragma unroll
    for (int chunk = 0; chunk < Config::TOKENS / Config::OUT_TOKENS; ++chunk) {
#pragma unroll
      for (int j = 0; j < Config::OUT_TOKENS / 8; ++j) {
        uint32_t packed[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = (chunk * Config::OUT_TOKENS + 8 * j) / 2 + 2 * h;
          Pair pair;
          pair.x = Element<Scalar>::from_float(sums_[at] * scale[h] + shift[h]);
          pair.y = Element<Scalar>::from_float(sums_[at + 1] * scale[h] + shift[h]);
          packed[h] = *reinterpret_cast<const uint32_t*>(&pair);
        }
        ptx::stmatrix_x2_transposed(&out[j * 8 + lane_ % 8][warp_ * 16 + lane_ / 8 % 2 * 8],
                                    packed[0], packed[1]);
      }
      ptx::named_sync(1 + group_, kWarpgroupThreads);
      common::copy_rows<kTileN, kWarpgroupThreads>(
          out, p_.out, p_.m, p_.n, token + chunk * Config::OUT_TOKENS, first,
          threadIdx.x % kWarpgroupThreads);
      ptx::named_sync(1 + group_, kWarpgroupThreads);
    }
  }

  // Each rank of the cluster leaves its sums where its ring was; then each adds one share of the
  // features over all ranks, and writes them.
  __device__ __forceinline__ void add_cluster(int rank, int feature, int token) {
    using Partial = typename Shared::Partial;
    Partial& partial = *reinterpret_cast<Partial*>(&shared_.ring);
    ptx::named_sync(1, Config::CONSUMERS);  // all warps have read the ring to its end
    const int tokens = min(Config::TOKENS, p_.m - token);
    const int row = group_ * kTileN + warp_ * 16 + lane_ / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < Config::TOKENS / 8; ++j)
        *reinterpret_cast<float2*>(&partial[row + 8 * h][j * 8 + lane_ % 4 * 2]) =
            make_float2(sums_[4 * j + 2 * h], sums_[4 * j + 2 * h + 1]);
    ptx::cluster_arrive();

    constexpr int kFeatures = Config::FEATURES / Config::SPLIT;
    constexpr int kAtOnce = Config::CONSUMERS / kFeatures;  // groups of four tokens
    const int f = rank * kFeatures + threadIdx.x % kFeatures;
    const int n = feature + f;
    const float scale = column_scale(n);
    const float shift = bias(n);
    Scalar* out = p_.out + static_cast<long long>(token) * p_.n + n;
    ptx::cluster_wait();
    if (n < p_.n) {
#pragma unroll 1
      for (int at = threadIdx.x / kFeatures * 4; at < tokens; at += kAtOnce * 4) {
        float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int source = 0; source < Config::SPLIT; ++source) {
          const float4 v = ptx::load_remote(&partial[f][at], source);
          sums[0] += v.x;
          sums[1] += v.y;
          sums[2] += v.z;
          sums[3] += v.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (at + i < tokens)
            out[static_cast<long long>(at + i) * p_.n] =
                Element<Scalar>::from_float(sums[i] * scale + shift);
      }
    }
  }

  const Problem<Scalar>& p_;
  Shared& shared_;
  const int group_;  // warpgroup
  const int warp_;   // in the warpgroup
  const int lane_;
  common::RingPosition<Config::STAGES> position_;
  int previous_ = 0;  // stage to be released
  uint32_t positions_[2][2];
  uint32_t fragments_[2][kSteps][4];
  float sums_[SUMS];
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    marlin24_kernel(const __grid_constant__ Problem<typename Config::Scalar> problem,
                    const __grid_constant__ TensorMap tokens) {
  using Shared = Storage<Config>;
  static_assert(sizeof(Shared) == Config::STORAGE_BYTES,
                "the host's formula for shared memory must agree with the struct");
  Shared& shared = ptx::shared_memory<Shared>();
  const int warp = ptx::warp_uniform(threadIdx.x / kWarpSize);
  constexpr int kFeedingWarp = Config::CONSUMERS / kWarpSize;
  if (warp == kFeedingWarp && ptx::elect_one()) {
    ptx::prefetch_tensor_map(&tokens);
    for (int stage = 0; stage < Config::STAGES; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::block_sync();
  ptx::launch_dependents();
  if (warp >= kFeedingWarp) {
    ptx::release_registers<Config::FEEDER_REGISTERS>();
    if (warp == kFeedingWarp) Feeder<Config>(problem, &tokens).run();
    if constexpr (Config::SPLIT > 1) {  // the consumers' barriers of add_cluster count everyone
      ptx::warp_sync();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  } else {
    ptx::acquire_registers<Config::CONSUMER_REGISTERS>();
    Consumer<Config>(problem).run();
  }
  if constexpr (Config::SPLIT > 1) {  // no block may end while others use its shared memory
    ptx::warp_sync();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace sparse
