// Accumulators of one warp -> rows of the output: scale (one per feature), bias, rounding,
// coalesced stores.
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
  static constexpr int ROW_CHUNKS = WARP_FEATURES / CHUNK;

 public:
  __device__ Epilogue(const Problem<Scalar>& p, SharedStorage<Config>& shared,
                      const WarpPlace<Config>& place)
      : p_(p), place_(place), staging_(shared.staging[place.output_warp()]) {
    const unsigned long long bits =
        reinterpret_cast<unsigned long long>(p.output) | p.n * sizeof(Scalar);
    whole_chunks_ = bits % sizeof(uint4) == 0;
  }

  __device__ __forceinline__ void write(const Unit& u, Accumulators<Config>& acc) {
    const int first_feature =
        u.column_tile * Config::TILE_N + place_.warp_n * WARP_FEATURES;
    const int first_token = u.token_tile * Config::TILE_M + place_.warp_m * Config::WARP_M;
    finish(first_feature, acc);
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
  // Scale and bias, in float32.
  __device__ __forceinline__ void finish(int first_feature, Accumulators<Config>& acc) {
    if (Config::GROUPED && p_.bias == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2 * ROW_TILES; ++half) {  // 8 features lane / 4 + 8 * half
      const int feature = first_feature + half * 8 + place_.lane / 4;
      const bool inside = feature < p_.n;
      float scale = 1.f;
      if constexpr (!Config::GROUPED)
        scale = inside ? Element<__half>::to_float(p_.scales[feature]) : 0.f;
      const bool biased = inside && p_.bias != nullptr;
      const float bias = biased ? Element<Scalar>::to_float(p_.bias[feature]) : 0.f;
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t) {
        float(&v)[4] = acc.values[half / 2][t];
        v[half % 2 * 2] = v[half % 2 * 2] * scale + bias;
        v[half % 2 * 2 + 1] = v[half % 2 * 2 + 1] * scale + bias;
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
      const int feature = first_feature + i % ROW_CHUNKS * CHUNK;
      const Scalar* source = staging_ + i / ROW_CHUNKS * ROW + i % ROW_CHUNKS * CHUNK;
      if (token >= p_.m || feature >= p_.n) continue;
      Scalar* target = p_.output + static_cast<long long>(token) * p_.n + feature;
      if (whole_chunks_) {  // then N is a multiple of 8: the chunk lies inside
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
      } else {
        const int count = p_.n - feature < CHUNK ? p_.n - feature : CHUNK;
        for (int e = 0; e < count; ++e) target[e] = source[e];
      }
    }
  }

  const Problem<Scalar>& p_;
  const WarpPlace<Config>& place_;
  Scalar* staging_;
  bool whole_chunks_;
};

}  // namespace sm80
