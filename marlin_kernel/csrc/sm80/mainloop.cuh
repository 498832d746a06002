// One stage of shared memory -> accumulators of one warp.
#pragma once

#include "dequant/int4.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "sm80/load.cuh"
#include "sm80/shared_storage.cuh"
#include "sm80/tile_config.cuh"

namespace sm80 {

// accumulators[row tile][token tile]: fragments of C^T, see ptx/mma.cuh.
template <class Config>
struct Accumulators {
  float values[ROW_TILES][Config::TOKEN_TILES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < ROW_TILES; ++j)
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[j][t][i] = 0.f;
  }
};

// Where a thread stands in the block.
template <class Config>
struct WarpPlace {
  int lane, warp_m, warp_n, warp_k;

  __device__ WarpPlace() {
    const int warp = threadIdx.x / WARP;
    lane = threadIdx.x % WARP;
    warp_n = warp % Config::WARPS_N;
    warp_m = warp / Config::WARPS_N % Config::WARPS_M;
    warp_k = warp / Config::OUTPUT_WARPS;
  }
  __device__ int output_warp() const { return warp_m * Config::WARPS_N + warp_n; }
};

// The token fragments of k16 step `step` of this stage, all TOKEN_TILES of them.
template <class Config>
__device__ __forceinline__ void load_tokens(const uint4* activations,
                                            const WarpPlace<Config>& place, int step,
                                            uint32_t (&b)[Config::TOKEN_TILES][2]) {
  // Lanes address rows: 8 tokens x (k 0..7 | k 8..15), then, for x4, the next 8 tokens alike.
  const int row = place.lane % 8;
  const int half = place.lane / 8 % 2;
  const int first = place.warp_m * Config::WARP_M + row;
  const int chunk = step * 2 + half;
  if constexpr (Config::TOKEN_TILES == 1) {
    ptx::ldmatrix_x2(b[0], activations + swizzled<Config>(first, chunk));
  } else {
    const int next = place.lane / 16 * MMA_TOKENS;
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; t += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, activations + swizzled<Config>(first + t * MMA_TOKENS + next, chunk));
      b[t][0] = r[0];
      b[t][1] = r[1];
      b[t + 1][0] = r[2];
      b[t + 1][1] = r[3];
    }
  }
}

// Scales of the 8 features lane / 4 + 8 * i of one group, as they lie in shared memory (fp16).
__device__ __forceinline__ uint32_t scale_pair(const uint4& scales, int j) {
  return j == 0 ? scales.x : j == 1 ? scales.y : j == 2 ? scales.z : scales.w;
}

// total += scale * sums, and sums = 0.
template <class Config>
__device__ __forceinline__ void add_scaled(Accumulators<Config>& total, Accumulators<Config>& sums,
                                           const uint4& scales) {
#pragma unroll
  for (int j = 0; j < ROW_TILES; ++j) {
    const uint32_t pair = scale_pair(scales, j);
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      scale[h] = Element<__half>::to_float(reinterpret_cast<const __half*>(&pair)[h]);
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) total.values[j][t][i] += scale[i / 2] * sums.values[j][t][i];
  }
  sums.clear();
}

// Adds one stage to `total`. Where the scales of groups go is the configuration's choice: on the
// weights (8 products per code word, whatever the number of tokens) or on the sums (2 per token and
// group).
template <class Config>
__device__ __forceinline__ void multiply_stage(const SharedStorage<Config>& shared, int stage,
                                               const WarpPlace<Config>& place,
                                               Accumulators<Config>& total) {
  using Scalar = typename Config::Scalar;
  constexpr bool SCALE_SUMS = Config::GROUPED && !Config::SCALE_WEIGHTS;
  constexpr int GROUP_STEPS =
      Config::GROUP_STEPS < Config::STEPS ? Config::GROUP_STEPS : Config::STEPS;
  Accumulators<Config> group_sums;
  Accumulators<Config>& sums = SCALE_SUMS ? group_sums : total;
  if constexpr (SCALE_SUMS) group_sums.clear();
  uint4 scales = {};
#pragma unroll(Config::UNROLL)
  for (int i = 0; i < Config::STEPS; ++i) {
    const int step = place.warp_k * Config::STEPS + i;
    if constexpr (Config::GROUPED) {
      if (i % GROUP_STEPS == 0) {
        const int row = Config::SCALE_ROWS > 1 ? step / Config::GROUP_STEPS : 0;
        scales = shared.scales[stage][row * (Config::TILE_N / CHUNK) +
                                      place.warp_n * (WARP_FEATURES / CHUNK) + place.lane / 4];
      }
    }
    const uint4 packed =
        shared.weights[stage][(step * Config::WARPS_N + place.warp_n) * WARP + place.lane];
    uint32_t b[Config::TOKEN_TILES][2];
    load_tokens<Config>(shared.activations[stage], place, step, b);
    const uint32_t words[ROW_TILES] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < ROW_TILES; ++j) {
      uint32_t a[4];
      dequant::int4_to_fragment(a, words[j], Scalar());
      if constexpr (Config::GROUPED && !SCALE_SUMS)
        dequant::RowScales<Scalar>(scale_pair(scales, j)).apply(a);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
        ptx::mma_m16n8k16(sums.values[j][t], a, b[t], Scalar());
    }
    if constexpr (SCALE_SUMS) {
      if ((i + 1) % GROUP_STEPS == 0) add_scaled(total, group_sums, scales);
    }
  }
}

}  // namespace sm80
