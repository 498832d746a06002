// Small batches: one pass over the weights at memory speed.
//
// Every warp owns a run of weight tiles of one 64-feature column and a private ring of bulk copies
// for them, filled before anything else happens and before the preceding kernel has ended (weights
// do not depend on it). Nothing synchronises warps until their sums are complete; those are added
// in a fixed order, first within the block, then, pushed through distributed shared memory, over
// the cluster that shares the column's k range. The split depends on K and N alone.
//
// Groups are scaled in the accumulator: sums of (code - 8) * activation are exact products in fp32,
// one fused multiply-add per accumulator and group replaces a multiplication per weight, and the
// scale never rounds.
#pragma once

#include "dequant/int4_biased.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/mma_add.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared_memory.cuh"
#include "sm90/decode_config.cuh"

namespace sm90 {

template <class Config>
class Decoder {
  using Scalar = typename Config::Scalar;
  using Scales = typename Config::Scales;
  using Storage = DecodeStorage<Config>;
  static_assert(sizeof(Storage) == Config::STORAGE_BYTES,
                "the host's formula for shared memory must agree with the struct");
  using Accumulators = float[4][Config::TOKEN_TILES][4];  // [16 features][8 tokens][fragment]

 public:
  __device__ __forceinline__ Decoder(const Problem<Scalar>& p)
      : p_(p),
        shared_(ptx::shared_memory<Storage>()),
        activations_(reinterpret_cast<uint8_t*>(&shared_ + 1)),
        warp_(ptx::warp_uniform(threadIdx.x / kWarpSize)),
        lane_(threadIdx.x % kWarpSize),
        rank_(Config::SPLIT > 1 ? static_cast<int>(blockIdx.x) : 0),
        block_range_(p.k_tiles, rank_, Config::SPLIT),
        column_(static_cast<int>(blockIdx.y) * Config::WARPS_N + warp_ % Config::WARPS_N) {
    const Range mine(block_range_.size(), warp_ / Config::WARPS_N, Config::WARPS_K);
    first_tile_ = block_range_.begin + mine.begin;
    tiles_ = column_ < p.column_tiles ? mine.size() : 0;
    row_bytes_ = block_range_.size() * kTileK * static_cast<int>(sizeof(Scalar)) + 16;
  }

  __device__ __forceinline__ void run() {
    start_pipeline();
    ptx::launch_dependents();
    if constexpr (Config::SPLIT > 1) ptx::cluster_arrive();
    load_activations();
    load_epilogue_operands();
    ptx::block_sync();
    multiply();
    add_warps();
    write_output();
  }

 private:
  // ---- weights: private ring of this warp ----
  __device__ __forceinline__ void start_pipeline() {
    const ColumnPair pair(column_ / 2, p_.column_tiles);
    codes_ = p_.weights + pair.tile_offset(first_tile_, p_.k_tiles) + column_ % 2 * kTileBytes;
    codes_step_ = pair.width * kTileBytes;
    scales_ = p_.scales + pair.scale_offset(0, Scales::groups(p_.k_tiles)) +
              column_ % 2 * kScaleRowBytes;
    scales_step_ = pair.width * kScaleRowBytes;
    if (ptx::elect_one()) {
#pragma unroll
      for (int stage = 0; stage < Config::STAGES; ++stage)
        ptx::mbarrier_init(&shared_.full[warp_][stage], 1);
      ptx::fence_mbarrier_init();
#pragma unroll
      for (int stage = 0; stage < Config::STAGES; ++stage)
        if (stage < tiles_) fetch(stage, stage);
    }
    ptx::warp_sync();
  }

  __device__ __forceinline__ void fetch(int tile, int stage) {
    uint64_t* full = &shared_.full[warp_][stage];
    uint8_t* target = shared_.ring[warp_] + stage * Config::STAGE_BYTES;
    ptx::mbarrier_arrive_expect(full, Config::STAGE_BYTES);
    ptx::bulk_copy(target, codes_ + tile * codes_step_, kTileBytes, full);
#pragma unroll
    for (int row = 0; row < Scales::kPerTile; ++row)
      ptx::bulk_copy(target + kTileBytes + row * kScaleRowBytes,
                     scales_ + (Scales::group_of(first_tile_ + tile) + row) * scales_step_,
                     kScaleRowBytes, full);
  }

  // ---- activations: the block's k range of every token, rows padded by 16 bytes against bank conf
  __device__ __forceinline__ void load_activations() {
    constexpr int kChunk = 8;  // elements of 16 bytes
    constexpr int kBatch = 4;  // loads in flight per thread
    const int chunks = block_range_.size() * (kTileK / kChunk);
    const int first_k = block_range_.begin * kTileK;
    const int items = p_.m * chunks;
    const bool aligned = (reinterpret_cast<unsigned long long>(p_.activations) |
                          static_cast<unsigned long long>(p_.row_stride) * sizeof(Scalar)) %
                             16 ==
                         0;
    if (!aligned || p_.k % kChunk != 0) {
      ptx::wait_for_predecessors();
      for (int item = threadIdx.x; item < items * kChunk; item += Config::THREADS) {
        const int token = item / (chunks * kChunk);
        const int i = item - token * (chunks * kChunk);
        reinterpret_cast<Scalar*>(activations_ + token * row_bytes_)[i] =
            first_k + i < p_.k ? p_.activations[token * p_.row_stride + first_k + i]
                               : Element<Scalar>::from_float(0.f);
      }
      return;
    }
    bool waited = false;
    for (int first = threadIdx.x; first < items || !waited; first += kBatch * Config::THREADS) {
      const uint4* sources[kBatch];
      uint8_t* targets[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = first + u * Config::THREADS;
        const int token = item / chunks;
        const int chunk = item - token * chunks;
        const int k = first_k + chunk * kChunk;
        targets[u] = item < items ? activations_ + token * row_bytes_ + chunk * 16 : nullptr;
        sources[u] = item < items && k < p_.k ? reinterpret_cast<const uint4*>(
                                                    p_.activations + token * p_.row_stride + k)
                                              : nullptr;
      }
      if (!waited) ptx::wait_for_predecessors();
      waited = true;
      uint4 values[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        values[u] = sources[u] != nullptr ? *sources[u] : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (targets[u] != nullptr) *reinterpret_cast<uint4*>(targets[u]) = values[u];
    }
  }

  // ---- mainloop ----
  __device__ __forceinline__ void multiply() {
    // Row of an 8 x 8 matrix that this lane addresses: token lane % 8; tokens that do not exist
    // repeat the last one, and nobody reads their results.
    const uint8_t* rows[Config::TOKEN_TILES];
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t) {
      const int token = min(t * 8 + lane_ % 8, p_.m - 1);
      rows[t] = activations_ + token * row_bytes_ +
                (first_tile_ - block_range_.begin) * kTileK * static_cast<int>(sizeof(Scalar)) +
                dequant::BiasedPair<Scalar>::chunk(lane_ / 8) * 16;
    }
    int stage = 0;
    uint32_t parity = 0;
    for (int tile = 0; tile < tiles_; ++tile) {
      ptx::mbarrier_wait(&shared_.full[warp_][stage], parity);
      multiply_tile(shared_.ring[warp_] + stage * Config::STAGE_BYTES, rows, tile);
      ptx::warp_sync();
      if (tile + Config::STAGES < tiles_ && ptx::elect_one()) fetch(tile + Config::STAGES, stage);
      ptx::warp_sync();
      if (++stage == Config::STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

  __device__ __forceinline__ void multiply_tile(const uint8_t* stage,
                                                const uint8_t* const (&rows)[Config::TOKEN_TILES],
                                                int tile) {
    uint4 words[4];
#pragma unroll
    for (int m = 0; m < 4; ++m)
      words[m] = reinterpret_cast<const uint4*>(stage)[m * kWarpSize + lane_];
    uint32_t tokens[Config::TOKEN_TILES][2][4];  // [8 tokens][32 k][B registers of two parts]
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::ldmatrix_x4(tokens[t][half],
                         rows[t] + tile * (kTileK * static_cast<int>(sizeof(Scalar))) + half * 64);

    constexpr int kPairsPerGroup = Config::GROUP == 32 ? 1 : 2;
#pragma unroll
    for (int first = 0; first < 2; first += kPairsPerGroup)
      multiply_group<kPairsPerGroup>(words, tokens, first,
                                     stage + kTileBytes + first * kScaleRowBytes);
  }

  // Add the product of PAIRS * 32 k, beginning with pair `first` of k steps, times its scales to
  // total_.
  template <int PAIRS>
  __device__ __forceinline__ void multiply_group(
      const uint4 (&words)[4], const uint32_t (&tokens)[Config::TOKEN_TILES][2][4], int first,
      const uint8_t* scale_row) {
    using Codes = dequant::BiasedPair<Scalar>;
    constexpr int kUnits = Codes::kUnits;
    // The bias of the codes times the tokens, the same for all features: where their sums begin.
    float bias[kUnits][Config::TOKEN_TILES][4] = {};
#pragma unroll
    for (int pair = first; pair < first + PAIRS; ++pair)
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int t = 0; t < Config::TOKEN_TILES; ++t) {
          const uint32_t a[4] = {Codes::bias(part), Codes::bias(part), Codes::bias(part),
                                 Codes::bias(part)};
          const uint32_t b[2] = {tokens[t][pair][2 * part], tokens[t][pair][2 * part + 1]};
          ptx::mma_m16n8k16(bias[Codes::unit(part)][t], a, b, Scalar());
        }
    uint4 packed = make_uint4(0, 0, 0, 0);
    if constexpr (Config::GROUP != 0) packed = reinterpret_cast<const uint4*>(scale_row)[lane_ / 4];
    const uint32_t scales[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float sums[kUnits][Config::TOKEN_TILES][4];
#pragma unroll
      for (int pair = first; pair < first + PAIRS; ++pair)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          uint32_t a[4];
          Codes::codes(a, part, pair == 0 ? words[m].x : words[m].z,
                       pair == 0 ? words[m].y : words[m].w);
          constexpr int kFirstOfUnit = kUnits == 2 ? 2 : 1;  // parts that begin a sum
          const int unit = Codes::unit(part);
#pragma unroll
          for (int t = 0; t < Config::TOKEN_TILES; ++t) {
            const uint32_t b[2] = {tokens[t][pair][2 * part], tokens[t][pair][2 * part + 1]};
            if (pair == first && part < kFirstOfUnit)
              ptx::mma_add_m16n8k16(sums[unit][t], a, b, bias[unit][t], Scalar());
            else
              ptx::mma_m16n8k16(sums[unit][t], a, b, Scalar());
          }
        }
      float2 scale = make_float2(1.f, 1.f);
      if constexpr (Config::GROUP != 0)
        scale = __half22float2(*reinterpret_cast<const __half2*>(&scales[m]));
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum = sums[0][t][i];
          if constexpr (kUnits == 2) sum += Codes::kSecond * sums[kUnits - 1][t][i];
          total_[m][t][i] += (i < 2 ? scale.x : scale.y) * sum;
        }
    }
  }

  // ---- reduction and output ----
  // Leave this warp's sums in its ring ([64 features][tokens]), add those of the warps that share a
  // column in order of k, and hand each feature to the rank of the cluster that writes it.
  __device__ __forceinline__ void add_warps() {
    ptx::warp_sync();
    float* mine = reinterpret_cast<float*>(shared_.ring[warp_]);
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
    if constexpr (Config::SPLIT > 1) ptx::cluster_wait();  // every block of the cluster has started

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
        const uint8_t* ring = shared_.ring[wk * Config::WARPS_N + feature / kTileN];
        const float4 part =
            reinterpret_cast<const float4*>(ring)[feature % kTileN * kQuads + quad];
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      const int owner = feature / Config::FEATURES_PER_RANK;
      float* target = &shared_.received[rank_][feature % Config::FEATURES_PER_RANK][quad * 4];
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

  // Bias and per-column scales of the features that this thread will write: fetched while weights
  // stream.
  __device__ __forceinline__ void load_epilogue_operands() {
#pragma unroll
    for (int i = 0; i < kOutFeatures; ++i) {
      const int n = static_cast<int>(blockIdx.y) * Config::FEATURES + out_feature(i);
      bias_[i] = p_.bias != nullptr && n < p_.n ? Element<Scalar>::to_float(p_.bias[n]) : 0.f;
      scale_[i] = dequant::BiasedPair<Scalar>::kUnit;
      if constexpr (Config::GROUP == 0) {
        if (n < p_.n)
          scale_[i] *=
              __half2float(reinterpret_cast<const __half*>(p_.scales)[column_scale_index(n)]);
      }
    }
  }

  __device__ __forceinline__ void write_output() {
#pragma unroll
    for (int i = 0; i < kOutFeatures; ++i) {
      const int feature = i * kOutThreads + threadIdx.x % kOutThreads;
      const int n = static_cast<int>(blockIdx.y) * Config::FEATURES + out_feature(i);
      if (n >= p_.n) continue;
      for (int token = threadIdx.x / kOutThreads; token < p_.m;
           token += Config::THREADS / kOutThreads) {
        float sum = 0.f;
#pragma unroll
        for (int source = 0; source < Config::SPLIT; ++source)
          sum += shared_.received[source][feature][token];
        p_.out[static_cast<long long>(token) * p_.n + n] =
            Element<Scalar>::from_float(sum * scale_[i] + bias_[i]);
      }
    }
  }

  const Problem<Scalar>& p_;
  Storage& shared_;
  uint8_t* const activations_;  // [m][row_bytes_]
  const int warp_;
  const int lane_;
  const int rank_;           // in the cluster
  const Range block_range_;  // k tiles of this block
  const int column_;         // column tile of this warp
  int first_tile_;           // first k tile of this warp
  int tiles_;                // number of them
  int row_bytes_;            // between tokens in shared memory
  const uint8_t* codes_;     // of this warp's first tile
  const uint8_t* scales_;    // of its column's first group
  int codes_step_;           // bytes from tile to tile
  int scales_step_;          // bytes from group to group
  Accumulators total_ = {};
  float bias_[kOutFeatures];
  float scale_[kOutFeatures];
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    decode_kernel(const __grid_constant__ Problem<typename Config::Scalar> problem) {
  Decoder<Config>(problem).run();
}

}  // namespace sm90
