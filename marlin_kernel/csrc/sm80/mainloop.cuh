// One stage of shared memory -> accumulators of one warp.
#pragma once

#include "dequant/int4.cuh"
#include "ptx/bit_ops.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "sm80/load.cuh"
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

// Multiplies a weight fragment by its scales: the low half of `scales` belongs to the fragment's rows 0..7
// (a[0], a[2]), the high half to rows 8..15 (a[1], a[3]).
template <class Scalar>
__device__ __forceinline__ void scale_fragment(uint32_t (&a)[4], uint32_t scales) {
  const uint32_t low = ptx::permute_bytes(scales, scales, 0x1010);
  const uint32_t high = ptx::permute_bytes(scales, scales, 0x3232);
  a[0] = ptx::mul2(a[0], low, Scalar{});
  a[1] = ptx::mul2(a[1], high, Scalar{});
  a[2] = ptx::mul2(a[2], low, Scalar{});
  a[3] = ptx::mul2(a[3], high, Scalar{});
}

// Adds one stage to the accumulators. With groups the scale multiplies the weight fragment, which rounds the
// weight to the compute type exactly as a dequantized matrix would hold it.
template <class Config>
__device__ __forceinline__ void multiply_stage(const SharedStorage<Config>& shared, int stage,
                                               const WarpPlace<Config>& place,
                                               Accumulators<Config>& acc) {
  using Scalar = typename Config::Scalar;
  uint4 scales = {};  // of the current group
#pragma unroll
  for (int i = 0; i < Config::STEPS; ++i) {
    const int step = place.warp_k * Config::STEPS + i;
    if constexpr (Config::GROUPED) {
      // Scales of the 8 features lane / 4 + 8 * j of this warp lie side by side.
      if (i % Config::GROUP_STEPS == 0) {
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
    const uint32_t pairs[ROW_TILES] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (int j = 0; j < ROW_TILES; ++j) {
      uint32_t a[4];
      dequant::int4_to_fragment(a, words[j], Scalar{});
      if constexpr (Config::GROUPED) scale_fragment<Scalar>(a, pairs[j]);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
        ptx::mma_m16n8k16(acc.values[j][t], a, b[t], Scalar{});
    }
  }
}

}  // namespace sm80
