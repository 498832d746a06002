// Accumulators of one warp -> rows of the output: scales that no group has, bias, rounding, coalesced
// stores.
#pragma once

#include "ptx/barrier.cuh"
#include "sm80/mainloop.cuh"
#include "sm80/partition.cuh"
#include "sm80/shared_storage.cuh"
#include "sm80/tile_config.cuh"

namespace sm80 {

template <class Config>
class Epilogue {
  using Scalar = typename Config::Scalar;
  static constexpr int ROW = WARP_FEATURES + STAGING_PAD;  // elements between staged rows
  static constexpr int ROW_CHUNKS = WARP_FEATURES / OUTPUT_CHUNK;

 public:
  __device__ Epilogue(const Problem<Config>& p, SharedStorage<Config>& shared,
                      const WarpPlace<Config>& place)
      : p_(p), place_(place), staging_(shared.staging[place.output_warp()]) {
    const unsigned long long bits =
        reinterpret_cast<unsigned long long>(p.output) | p.n * sizeof(Scalar);
    whole_chunks_ = bits % sizeof(uint4) == 0;
  }

  // Scales that no group has: those of features (one group), of all weights, and the unit that
  // dequantization leaves. Sums that are exchanged in fp16 are scaled before, others once at the end.
  __device__ __forceinline__ void scale(const Unit& u, Accumulators<Config>& acc) {
    constexpr float UNIT = kSumUnit<Config>;
    const bool global = Config::Weight::SCALES == Scales::E4M3 && p_.global_scale != nullptr;
    if (Config::GROUPED && UNIT == 1.f && !global) return;
    const int first_feature = u.column_tile * Config::TILE_N + place_.warp_n * WARP_FEATURES;
    const float common = global ? UNIT * *p_.global_scale : UNIT;
#pragma unroll
    for (int half = 0; half < 2 * ROW_TILES; ++half) {  // 8 features lane / 4 + 8 * half
      float factor = common;
      if constexpr (!Config::GROUPED) {
        const int feature = first_feature + half * 8 + place_.lane / 4;
        const __half* scales = static_cast<const __half*>(p_.scales);
        factor *= feature < p_.n ? Element<__half>::to_float(scales[feature]) : 0.f;
      }
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t) {
        acc.values[half / 2][t][half % 2 * 2] *= factor;
        acc.values[half / 2][t][half % 2 * 2 + 1] *= factor;
      }
    }
  }

  __device__ __forceinline__ void write(const Unit& u, Accumulators<Config>& acc) {
    const int first_feature =
        u.column_tile * Config::TILE_N + place_.warp_n * WARP_FEATURES;
    const int first_token = u.token_tile * Config::TILE_M + place_.warp_m * Config::WARP_M;
    if constexpr (!Config::REDUCE_HALF) scale(u, acc);
    finish(first_feature, first_token, acc);
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t) {
      if (first_token + t * MMA_TOKENS >= p_.m) break;
      ptx::warp_sync();  // the lanes have read the rows staged before
      stage(t, acc);
      ptx::warp_sync();  // all lanes' elements are in place
      store_rows(first_token + t * MMA_TOKENS, first_feature);
    }
  }

 private:
  // Scales of tokens, and bias.
  __device__ __forceinline__ void finish(int first_feature, int first_token,
                                         Accumulators<Config>& acc) {
    if constexpr (Config::EIGHT_BIT) {
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int token = first_token + t * MMA_TOKENS + place_.lane % 4 * 2 + c;
          const float factor = token < p_.m ? p_.token_scales[token] : 0.f;
#pragma unroll
          for (int j = 0; j < ROW_TILES; ++j) {
            acc.values[j][t][c] *= factor;
            acc.values[j][t][c + 2] *= factor;
          }
        }
      }
    }
    if (p_.bias == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2 * ROW_TILES; ++half) {
      const int feature = first_feature + half * 8 + place_.lane / 4;
      const float bias = feature < p_.n ? Element<Scalar>::to_float(p_.bias[feature]) : 0.f;
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t) {
        acc.values[half / 2][t][half % 2 * 2] += bias;
        acc.values[half / 2][t][half % 2 * 2 + 1] += bias;
      }
    }
  }

  // Rounds the 8 tokens of fragment column t and lays them out as rows of features.
  __device__ __forceinline__ void stage(int t, Accumulators<Config>& acc) {
    const int feature = place_.lane / 4;
    const int token = place_.lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < ROW_TILES; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        staging_[(token + i % 2) * ROW + j * 16 + i / 2 * 8 + feature] =
            Element<Scalar>::from_float(acc.values[j][t][i]);
      }
    }
  }

  __device__ __forceinline__ void store_rows(int first_token, int first_feature) {
#pragma unroll
    for (int i = place_.lane; i < MMA_TOKENS * ROW_CHUNKS; i += WARP) {
      const int token = first_token + i / ROW_CHUNKS;
      const int feature = first_feature + i % ROW_CHUNKS * OUTPUT_CHUNK;
      const Scalar* source = staging_ + i / ROW_CHUNKS * ROW + i % ROW_CHUNKS * OUTPUT_CHUNK;
      if (token >= p_.m || feature >= p_.n) continue;
      Scalar* target = p_.output + static_cast<long long>(token) * p_.n + feature;
      if (whole_chunks_) {  // then N is a multiple of 8: the chunk lies inside
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
      } else {
        const int count = p_.n - feature < OUTPUT_CHUNK ? p_.n - feature : OUTPUT_CHUNK;
        for (int e = 0; e < count; ++e) target[e] = source[e];
      }
    }
  }

  const Problem<Config>& p_;
  const WarpPlace<Config>& place_;
  Scalar* staging_;
  bool whole_chunks_;
};

}  // namespace sm80
