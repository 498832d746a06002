// Global memory -> one stage of the ring. Every thread copies its share of the weights, of the
// activations and of the scales of one k tile; what lies outside the matrices arrives as zeros.
#pragma once

#include "ptx/cp_async.cuh"
#include "sm80/shared_storage.cuh"
#include "sm80/tile_config.cuh"

namespace sm80 {

// Position of a 16-byte chunk in a stage of activations. Rows are ROW_CHUNKS chunks long; XOR with
// the row spreads the same chunk of eight consecutive rows, which one ldmatrix reads, over all 32
// banks.
template <class Config>
__device__ __forceinline__ int swizzled(int token, int chunk) {
  return token * Config::ROW_CHUNKS + (chunk ^ (token & 7));
}

template <class Config>
class Loader {
  using Scalar = typename Config::Scalar;

 public:
  __device__ Loader(const Problem<Scalar>& p, SharedStorage<Config>& shared)
      : p_(p), shared_(shared) {
    const unsigned long long bits = reinterpret_cast<unsigned long long>(p.activations) |
                                    static_cast<unsigned long long>(p.row_stride) * sizeof(Scalar);
    aligned_bytes_ = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  }

  // Start the copies of k tile `k_tile` into `stage`; they complete with this thread's next commit
  // group.
  __device__ __forceinline__ void load(int stage, int token_tile, int column_tile, int k_tile) {
    load_weights(stage, column_tile, k_tile);
    load_activations(stage, token_tile, k_tile);
    if constexpr (Config::GROUPED) load_scales(stage, column_tile, k_tile);
  }

 private:
  __device__ __forceinline__ void load_weights(int stage, int column_tile, int k_tile) {
    constexpr int ROW = Config::WARPS_N * WARP;  // chunks of one row of packed tiles in this block
    const int row_chunks = p_.n_padded / 2;      // chunks of a whole row: 2 N' words
    const int first_chunk = column_tile * ROW;
    const int first_row = k_tile * (Config::TILE_K / MMA_K);
#pragma unroll
    for (int i = threadIdx.x; i < Config::WEIGHT_CHUNKS; i += Config::THREADS) {
      const int row = first_row + i / ROW;
      const int chunk = first_chunk + i % ROW;
      const bool inside = row < p_.k_padded / MMA_K && chunk < row_chunks;
      const long long at = inside ? static_cast<long long>(row) * row_chunks + chunk : 0;
      ptx::cp_async_16(&shared_.weights[stage][i], p_.weights + at, inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ void load_activations(int stage, int token_tile, int k_tile) {
#pragma unroll
    for (int i = threadIdx.x; i < Config::TOKEN_CHUNKS; i += Config::THREADS) {
      const int row = i / Config::ROW_CHUNKS;
      const int chunk = i % Config::ROW_CHUNKS;
      const int token = token_tile * Config::TILE_M + row;
      const int k = k_tile * Config::TILE_K + chunk * CHUNK;
      int count = token < p_.m ? p_.k - k : 0;  // elements that exist, of 8
      count = count < 0 ? 0 : count > CHUNK ? CHUNK : count;
      const Scalar* source = p_.activations + (count > 0 ? token * p_.row_stride + k : 0);
      uint4* target = &shared_.activations[stage][swizzled<Config>(row, chunk)];
      if (aligned_bytes_ == 16) {
        ptx::cp_async_16(target, source, count * static_cast<int>(sizeof(Scalar)));
      } else {
        load_unaligned(target, source, count);
      }
    }
  }

  // Rows that do not start on 16 bytes: copies of 4 bytes, or of single elements through registers.
  // The latter are complete at once, which the ring's barriers order like any earlier completion.
  __device__ __forceinline__ void load_unaligned(uint4* target, const Scalar* source, int count) {
    if (aligned_bytes_ == 4) {
#pragma unroll
      for (int pair = 0; pair < CHUNK / 2; ++pair) {
        const int left = count - 2 * pair;
        const int bytes = left >= 2 ? 4 : left == 1 ? 2 : 0;
        ptx::cp_async_4(reinterpret_cast<uint32_t*>(target) + pair,
                        bytes > 0 ? source + 2 * pair : p_.activations, bytes);
      }
      return;
    }
    const unsigned short* elements = reinterpret_cast<const unsigned short*>(source);
    uint32_t words[CHUNK / 2];
#pragma unroll
    for (int pair = 0; pair < CHUNK / 2; ++pair) {
      const uint32_t low = 2 * pair < count ? elements[2 * pair] : 0;
      const uint32_t high = 2 * pair + 1 < count ? elements[2 * pair + 1] : 0;
      words[pair] = low | high << 16;
    }
    *target = uint4{words[0], words[1], words[2], words[3]};
  }

  __device__ __forceinline__ void load_scales(int stage, int column_tile, int k_tile) {
    constexpr int ROW = Config::TILE_N / CHUNK;
    const int first_group = k_tile * Config::TILE_K / Config::GROUP_SIZE;
    const int groups = p_.k_padded / Config::GROUP_SIZE;
#pragma unroll
    for (int i = threadIdx.x; i < Config::SCALE_CHUNKS; i += Config::THREADS) {
      const int group = first_group + i / ROW;
      const int column = column_tile * Config::TILE_N + i % ROW * CHUNK;
      const bool inside = group < groups && column < p_.n_padded;
      const long long at = inside ? static_cast<long long>(group) * p_.n_padded + column : 0;
      ptx::cp_async_16(&shared_.scales[stage][i], p_.scales + at, inside ? 16 : 0);
    }
  }

  const Problem<Scalar>& p_;
  SharedStorage<Config>& shared_;
  int aligned_bytes_;
};

}  // namespace sm80
