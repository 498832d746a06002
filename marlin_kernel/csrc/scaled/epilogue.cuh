// Sums of a tile to scaled outputs: scales of tokens and features, bias, parts of a k range added up
// in a cluster.
//
// For kernels whose Config, Storage and Problem have the names of scaled/config.cuh.
#pragma once

#include "common/copy_rows.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/stmatrix.cuh"
#include "scaled/config.cuh"

namespace scaled {

// What a thread of the multiplying warpgroups knows of itself, and how its sums are written.
template <class Config, class Shared>
class Output {
 protected:
  using Out = typename Config::Out;
  using Pair = typename Element<Out>::Pair;
  static constexpr int kSums = Config::TOKENS / 2;
  static constexpr int kOwnTokens = ceil_div(Config::TOKENS, kWarpgroupThreads);

  __device__ __forceinline__ explicit Output(const Problem<Out>& p)
      : p_(p),
        shared_(ptx::shared_memory<Shared>()),
        group_(ptx::warp_uniform(threadIdx.x / kWarpgroupThreads)),
        warp_(ptx::warp_uniform(threadIdx.x / kWarpSize % 4)),
        lane_(threadIdx.x % kWarpSize) {}

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

  __device__ __forceinline__ float feature_scale(int n) const {
    return n < p_.n ? p_.scale_b[static_cast<long long>(n) * p_.scale_b_stride] : 0.f;
  }
  __device__ __forceinline__ float bias(int n) const {
    return p_.bias != nullptr && n < p_.n ? Element<Out>::to_float(p_.bias[n]) : 0.f;
  }
  // One rounding a product, and no contraction to a fused multiply-add: equal to the reference.
  template <class Sum>
  static __device__ __forceinline__ float scaled_sum(Sum sum, float scale_b, float scale_a,
                                                     float bias) {
    return __fadd_rn(__fmul_rn(__fmul_rn(static_cast<float>(sum), scale_b), scale_a), bias);
  }

  template <class Sum>
  __device__ __forceinline__ void write_tile(const Sum (&sums)[kSums], int feature, int token) {
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
          pair.x = Element<Out>::from_float(scaled_sum(sums[at], scale[h], factor.x, shift[h]));
          pair.y =
              Element<Out>::from_float(scaled_sum(sums[at + 1], scale[h], factor.y, shift[h]));
          packed[h] = *reinterpret_cast<const uint32_t*>(&pair);
        }
        ptx::stmatrix_x2_transposed(&out[j * 8 + lane_ % 8][warp_ * 16 + lane_ / 8 % 2 * 8],
                                    packed[0], packed[1]);
      }
      ptx::named_sync(1 + group_, kWarpgroupThreads);
      common::copy_rows<kGroupFeatures, kWarpgroupThreads>(
          out, p_.out, p_.m, p_.n, token + chunk * Config::OUT_TOKENS, first,
          warp_ * kWarpSize + lane_);
    }
    ptx::named_sync(1 + group_, kWarpgroupThreads);  // before scales or output are overwritten
  }

  template <class Sum>
  static __device__ __forceinline__ uint32_t bits(Sum v) {
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  template <class Sum>
  static __device__ __forceinline__ Sum value(float v) {
    return *reinterpret_cast<const Sum*>(&v);
  }

  // Each rank of the cluster leaves its sums where its ring was; then each adds one share of the
  // features over all ranks, and writes them.
  template <class Sum>
  __device__ __forceinline__ void add_cluster(const Sum (&own)[kSums], int rank, int feature,
                                              int token) {
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
            make_uint2(bits(own[4 * j + 2 * h]), bits(own[4 * j + 2 * h + 1]));
    ptx::cluster_arrive();

    constexpr int kFeatures = Config::FEATURES / Config::SPLIT;
    constexpr int kAtOnce = Config::CONSUMERS / kFeatures;  // groups of four tokens
    const int thread = group_ * kWarpgroupThreads + warp_ * kWarpSize + lane_;
    const int f = rank * kFeatures + thread % kFeatures;
    const int n = feature + f;
    const float scale = feature_scale(n);
    const float shift = bias(n);
    Out* out = p_.out + static_cast<long long>(token) * p_.n + n;
    ptx::cluster_wait();
    if (n < p_.n) {
#pragma unroll 1
      for (int at = thread / kFeatures * 4; at < tokens; at += kAtOnce * 4) {
        Sum sums[4] = {0, 0, 0, 0};
#pragma unroll
        for (int source = 0; source < Config::SPLIT; ++source) {
          const float4 v = ptx::load_remote(&partial[f][at], source);
          sums[0] += value<Sum>(v.x);
          sums[1] += value<Sum>(v.y);
          sums[2] += value<Sum>(v.z);
          sums[3] += value<Sum>(v.w);
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
  int lane_;

 private:
  float scales_[kOwnTokens];
};

}  // namespace scaled
