// One stage of shared memory -> accumulators of one warp.
#pragma once

#include "dequant/eight_bit.cuh"
#include "dequant/float4.cuh"
#include "dequant/float8.cuh"
#include "dequant/integer4.cuh"
#include "dequant/integer8.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/mma_8bit.cuh"
#include "sm80/load.cuh"
#include "sm80/shared_storage.cuh"
#include "sm80/tile_config.cuh"

namespace sm80 {

// accumulators[row tile][token tile]: fragments of C^T, see ptx/mma.cuh.
template <class Config, class Value = float>
struct Accumulators {
  Value values[ROW_TILES][Config::TOKEN_TILES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < ROW_TILES; ++j)
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[j][t][i] = 0;
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

// The token fragments of mma step `step` of this stage, all TOKEN_TILES of them.
template <class Config>
__device__ __forceinline__ void load_tokens(const uint4* activations,
                                            const WarpPlace<Config>& place, int step,
                                            uint32_t (&b)[Config::TOKEN_TILES][2]) {
  // Lanes address rows: 8 tokens x (first | second 16 bytes of k), then, for x4, the next 8 tokens alike.
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

// The register unit of the sums (dequant/dequantizer.cuh).
template <class Config>
constexpr float sum_unit() {
  if constexpr (Config::EIGHT_BIT) {
    return dequant::EightBit<typename Config::Weight, typename Config::Activation>::UNIT;
  } else {
    using Dequantizer = dequant::Dequantizer<typename Config::Weight, typename Config::Scalar>;
    return Config::GROUPED && Config::SCALE_WEIGHTS ? Dequantizer::SCALED_UNIT : Dequantizer::UNIT;
  }
}
template <class Config>
constexpr float kSumUnit = sum_unit<Config>();

// total += scale * sums, and sums = 0. scales: fp16, of the 8 features lane / 4 + 8 * i; all 1
// without groups.
template <class Config, class Value>
__device__ __forceinline__ void add_scaled(Accumulators<Config>& total,
                                           Accumulators<Config, Value>& sums,
                                           const uint32_t* scales) {
#pragma unroll
  for (int j = 0; j < ROW_TILES; ++j) {
    float scale[2] = {1.f, 1.f};
#pragma unroll
    for (int h = 0; Config::GROUPED && h < 2; ++h)
      scale[h] = Element<__half>::to_float(reinterpret_cast<const __half*>(&scales[j])[h]);
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = static_cast<float>(sums.values[j][t][i]);
        total.values[j][t][i] += Config::GROUPED ? scale[i / 2] * sum : sum;
      }
  }
  sums.clear();
}

// The words of packed tile `tile` (k16 row * WARPS_N + column) of a stage that this lane feeds to
// the matrix instructions: words[j] for the features of row tile j.
template <class Config>
__device__ __forceinline__ void load_words(const uint4* weights, int tile, int lane,
                                           uint32_t (&words)[ROW_TILES][Config::LANE_CHUNKS]) {
  uint32_t* flat = &words[0][0];
#pragma unroll
  for (int part = 0; part < Config::LANE_CHUNKS; ++part) {
    const uint4 v = weights[tile * Config::BLOCK_CHUNKS + weight_chunk<Config>(lane, part)];
    flat[4 * part] = v.x;
    flat[4 * part + 1] = v.y;
    flat[4 * part + 2] = v.z;
    flat[4 * part + 3] = v.w;
  }
}

// Loads scales and zero points of the group that mma step `step` of the stage lies in.
template <class Config>
__device__ __forceinline__ void load_group(const SharedStorage<Config>& shared, int stage, int step,
                                           const WarpPlace<Config>& place,
                                           dequant::GroupRegisters<typename Config::Weight>& to) {
  const int row = Config::SCALE_ROWS > 1 ? step / Config::GROUP_STEPS : 0;
  const int lane_group = place.warp_n * (WARP_FEATURES / 8) + place.lane / 4;
  to.load_scales(shared.scales[stage] + row * Config::SCALE_ROW_CHUNKS, lane_group);
  if constexpr (SharedStorage<Config>::ZEROS)
    to.load_zeros(shared.zeros[stage] + row * Config::ZERO_ROW_CHUNKS, lane_group);
}

// Adds one stage to `total`. Where the scales of groups go is the configuration's choice: on the
// weights (8 products per code word, whatever the number of tokens) or on the sums (2 per token and
// group).
template <class Config>
__device__ __forceinline__ void multiply_16_bit(const SharedStorage<Config>& shared, int stage,
                                                const WarpPlace<Config>& place,
                                                Accumulators<Config>& total) {
  using Scalar = typename Config::Scalar;
  using Dequantizer = dequant::Dequantizer<typename Config::Weight, Scalar>;
  static_assert(Dequantizer::WORDS == Config::LANE_CHUNKS, "a lane's words of one row tile");
  constexpr bool SCALE_SUMS = Config::GROUPED && !Config::SCALE_WEIGHTS;
  constexpr int GROUP_STEPS =
      Config::GROUP_STEPS < Config::STEPS ? Config::GROUP_STEPS : Config::STEPS;
  Accumulators<Config> group_sums;
  Accumulators<Config>& sums = SCALE_SUMS ? group_sums : total;
  if constexpr (SCALE_SUMS) group_sums.clear();
  dequant::GroupRegisters<typename Config::Weight> group = {};
#pragma unroll(Config::UNROLL)
  for (int i = 0; i < Config::STEPS; ++i) {
    const int step = place.warp_k * Config::STEPS + i;
    if constexpr (Config::GROUPED) {
      if (i % GROUP_STEPS == 0) load_group<Config>(shared, stage, step, place, group);
    }
    uint32_t words[ROW_TILES][Config::LANE_CHUNKS];
    load_words<Config>(shared.weights[stage], step * Config::WARPS_N + place.warp_n, place.lane,
                       words);
    uint32_t b[Config::TOKEN_TILES][2];
    load_tokens<Config>(shared.activations[stage], place, step, b);
#pragma unroll
    for (int j = 0; j < ROW_TILES; ++j) {
      uint32_t a[4];
      Dequantizer::fragment(a, words[j], group.zeros, j);
      if constexpr (Config::GROUPED && !SCALE_SUMS) Dequantizer::apply(a, group.scales, j);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
        ptx::mma_m16n8k16(sums.values[j][t], a, b[t], Scalar());
    }
    if constexpr (SCALE_SUMS) {
      if ((i + 1) % GROUP_STEPS == 0) add_scaled(total, group_sums, group.scales);
    }
  }
}

// The same for activations of 8 bits: 32 k per mma, and sums of a group (of a stage, if there is
// only one group) apart until they are scaled; int8 sums are exact.
template <class Config>
__device__ __forceinline__ void multiply_8_bit(const SharedStorage<Config>& shared, int stage,
                                               const WarpPlace<Config>& place,
                                               Accumulators<Config>& total) {
  using Activation = typename Config::Activation;
  using Operand = dequant::EightBit<typename Config::Weight, Activation>;
  using Sum = typename Operand::Sum;
  constexpr int GROUP_STEPS =
      Config::GROUP_STEPS < Config::STEPS ? Config::GROUP_STEPS : Config::STEPS;
  Accumulators<Config, Sum> sums;
  sums.clear();
  dequant::GroupRegisters<typename Config::Weight> group = {};
#pragma unroll(Config::UNROLL)
  for (int i = 0; i < Config::STEPS; ++i) {
    const int step = place.warp_k * Config::STEPS + i;
    if constexpr (Config::GROUPED) {
      if (i % GROUP_STEPS == 0) load_group<Config>(shared, stage, step, place, group);
    }
    uint32_t words[2][ROW_TILES][Config::LANE_CHUNKS];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_words<Config>(shared.weights[stage],
                         (2 * step + half) * Config::WARPS_N + place.warp_n, place.lane,
                         words[half]);
    uint32_t b[Config::TOKEN_TILES][2];
    load_tokens<Config>(shared.activations[stage], place, step, b);
#pragma unroll
    for (int j = 0; j < ROW_TILES; ++j) {
      uint32_t a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        Operand::rows(a[2 * half], a[2 * half + 1], words[half][j], group.zeros, j);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
        ptx::mma_m16n8k32(sums.values[j][t], a, b[t], Activation());
    }
    if ((i + 1) % GROUP_STEPS == 0) add_scaled(total, sums, group.scales);
  }
}

template <class Config>
__device__ __forceinline__ void multiply_stage(const SharedStorage<Config>& shared, int stage,
                                               const WarpPlace<Config>& place,
                                               Accumulators<Config>& total) {
  if constexpr (Config::EIGHT_BIT) {
    multiply_8_bit(shared, stage, place, total);
  } else {
    multiply_16_bit(shared, stage, place, total);
  }
}

}  // namespace sm80
