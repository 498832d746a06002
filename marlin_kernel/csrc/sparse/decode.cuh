// Small batches of 2:4 sparse weights on sm_90a: mma.sp, one pass over the weights at memory speed.
//
// sm90/small_batch.cuh says how; weights lie as in config.cuh, a warp multiplies whole tiles. Scales
// of groups multiply the sums of a tile, in fp32, and never round.
#pragma once

#include "ptx/ldmatrix.cuh"
#include "ptx/mma_sp.cuh"
#include "sm90/small_batch.cuh"
#include "sparse/config.cuh"
#include "sparse/dequant.cuh"

namespace sparse {

template <class Scalar_,       // __half or __nv_bfloat16: activations and output
          int BITS_,           // of a code: 4 or 8
          int GROUP_,          // k that share a scale: 128; 0 = the whole column
          int TOKEN_TILES_,    // from here on as in sm90::SmallBatchShape
          int WARPS_N_, int WARPS_K_, int SPLIT_, int STAGES_, int BLOCKS_PER_SM_,
          int STORAGE_BYTES_>
struct DecodeConfig : sm90::SmallBatchShape<TOKEN_TILES_, WARPS_N_, WARPS_K_, SPLIT_, STAGES_,
                                            BLOCKS_PER_SM_, STORAGE_BYTES_>,
                      TileLayout<BITS_, GROUP_> {
  using Scalar = Scalar_;
  static constexpr int TILE_K = kTileK;
  static constexpr int STAGE_BYTES = TileLayout<BITS_, GROUP_>::TILE_BYTES;
};

template <class Config>
class Decoder : public sm90::SmallBatch<Config, Decoder<Config>> {
  using Base = sm90::SmallBatch<Config, Decoder<Config>>;
  friend Base;
  using Scalar = typename Config::Scalar;
  using Base::cursor_, Base::first_tile_, Base::lane_, Base::p_, Base::shared_, Base::total_;
  using Base::warp_;

 public:
  __device__ __forceinline__ explicit Decoder(const sm90::Problem<Scalar>& p) : Base(p) {}

 private:
  __device__ __forceinline__ void enter_column() {
    tiles_of_column_ = p_.weights + (static_cast<long long>(cursor_.column) * p_.k_tiles +
                                     first_tile_) * Config::TILE_BYTES;
  }
  __device__ __forceinline__ void fetch_tile(uint8_t* target, uint64_t* full) const {
    ptx::bulk_copy(target, tiles_of_column_ + cursor_.tile * Config::TILE_BYTES,
                   Config::TILE_BYTES, full);
  }
  __device__ __forceinline__ void load() { Base::load_activations(); }

  // Sums of this warp's run of one column. exists: N' may end before the block's last column.
  __device__ __forceinline__ void multiply(bool exists) {
    Base::clear_sums();
    if (!exists) return;
    // Row of an 8 x 8 matrix that this lane addresses: token lane % 8; tokens that do not exist
    // repeat the last one, and nobody reads their results.
    const uint8_t* rows[Config::TOKEN_TILES];
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t)
      rows[t] = Base::activations_ + min(t * 8 + lane_ % 8, p_.m - 1) * Base::row_bytes_ +
                (first_tile_ - Base::block_range_.begin) * kRowTileBytes + lane_ / 8 * 16;
    for (int tile = 0; tile < Base::tiles_; ++tile) {
      ptx::mbarrier_wait(&shared_.full[warp_][Base::stage_], Base::parity_);
      multiply_tile(shared_.ring[warp_] + Base::stage_ * Config::STAGE_BYTES, rows);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t) rows[t] += kRowTileBytes;
      Base::advance();
    }
  }

  __device__ __forceinline__ void multiply_tile(
      const uint8_t* tile, const uint8_t* const (&rows)[Config::TOKEN_TILES]) {
    uint32_t tokens[Config::TOKEN_TILES][kSteps][4];
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
      for (int s = 0; s < kSteps; ++s) ptx::ldmatrix_x4(tokens[t][s], rows[t] + s * 64);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if constexpr (Config::GROUPED) {
        float sums[Config::TOKEN_TILES][4] = {};
        multiply_rows(sums, tile, tokens, m);
        const float2 scale = __half22float2(
            tile_scales(tile + Config::CODE_BYTES + kPositionBytes, m, lane_));
#pragma unroll
        for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            total_[m][t][i] += (i < 2 ? scale.x : scale.y) * sums[t][i];
      } else {
        multiply_rows(total_[m], tile, tokens, m);
      }
    }
  }

  // sums += products of rows 16 m .. 16 m + 15 of the tile, without scales.
  __device__ __forceinline__ void multiply_rows(
      float (&sums)[Config::TOKEN_TILES][4], const uint8_t* tile,
      const uint32_t (&tokens)[Config::TOKEN_TILES][kSteps][4], int m) {
    uint32_t words[kSteps][Config::STEP_WORDS];
    uint32_t positions[2];
    load_codes<Config>(words, positions, tile, m * kWarpSize + lane_);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4];
      codes_to_fragment(a, words[s], Scalar());
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
        if (s % 2 == 0)
          ptx::mma_sp_m16n8k32<0>(sums[t], a, tokens[t][s], positions[s / 2], Scalar());
        else
          ptx::mma_sp_m16n8k32<1>(sums[t], a, tokens[t][s], positions[s / 2], Scalar());
    }
  }

  __device__ __forceinline__ float column_scale(int n) const {
    if constexpr (Config::GROUPED) return 1.f;
    return n < p_.n ? __half2float(reinterpret_cast<const __half*>(p_.scales)[n]) : 0.f;
  }

  static constexpr int kRowTileBytes = kTileK * static_cast<int>(sizeof(Scalar));
  const uint8_t* tiles_of_column_ = nullptr;  // of the cursor's column, from first_tile_ on
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    decode_kernel(const __grid_constant__ sm90::Problem<typename Config::Scalar> problem) {
  Decoder<Config>(problem).run();
}

}  // namespace sparse
