// Global memory -> one stage of the ring. Every thread copies its share of the weights, of the
// activations and of the scales and zero points of one k tile; what lies outside the matrices
// arrives as zeros.
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

// Position of chunk `part` of `lane` in a packed tile in shared memory. A lane's 32 bytes of 8-bit
// codes lie apart, so that eight lanes read 128 bytes in a row; XOR keeps copies, which bring both
// chunks of four lanes, on different banks.
template <class Config>
__device__ __forceinline__ int weight_chunk(int lane, int part) {
  if constexpr (Config::LANE_CHUNKS == 1) return lane;
  return part * WARP + (lane ^ (part * 4));
}

template <class Config>
class Loader {
  using Activation = typename Config::Activation;

 public:
  __device__ Loader(const Problem<Config>& p, SharedStorage<Config>& shared)
      : p_(p), shared_(shared) {
    const unsigned long long bits =
        reinterpret_cast<unsigned long long>(p.activations) |
        static_cast<unsigned long long>(p.row_stride) * sizeof(Activation);
    aligned_bytes_ = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  }

  // Start the copies of k tile `k_tile` into `stage`; they complete with this thread's next commit
  // group.
  __device__ __forceinline__ void load(int stage, int token_tile, int column_tile, int k_tile) {
    load_weights(stage, column_tile, k_tile);
    if constexpr (Config::GROUPED) {
      load_rows<Config::SCALE_ROW_CHUNKS>(shared_.scales[stage], p_.scales, column_tile, k_tile);
      if constexpr (Config::ZERO_CHUNKS > 0)
        load_rows<Config::ZERO_ROW_CHUNKS>(shared_.zeros[stage], p_.zeros, column_tile, k_tile);
    }
    if constexpr (Config::PERMUTED) {
      gather_activations(stage, token_tile, k_tile);
    } else {
      load_activations(stage, token_tile, k_tile);
    }
  }

 private:
  __device__ __forceinline__ void load_weights(int stage, int column_tile, int k_tile) {
    // chunks of one row of packed tiles, in this block and in the whole matrix
    constexpr int ROW = Config::WARPS_N * Config::BLOCK_CHUNKS;
    const int row_chunks = p_.n_padded / WARP_FEATURES * Config::BLOCK_CHUNKS;
    const int first_chunk = column_tile * ROW;
    const int first_row = k_tile * (Config::TILE_K / PACKED_K);
#pragma unroll
    for (int i = threadIdx.x; i < Config::WEIGHT_CHUNKS; i += Config::THREADS) {
      const int row = first_row + i / ROW;
      const int chunk = first_chunk + i % ROW;
      const bool inside = row < p_.k_padded / PACKED_K && chunk < row_chunks;
      const long long at = inside ? static_cast<long long>(row) * row_chunks + chunk : 0;
      const int in_tile = i % Config::BLOCK_CHUNKS;
      const int target = i - in_tile + weight_chunk<Config>(in_tile / Config::LANE_CHUNKS,
                                                            in_tile % Config::LANE_CHUNKS);
      ptx::cp_async_16(&shared_.weights[stage][target], p_.weights + at, inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ void load_activations(int stage, int token_tile, int k_tile) {
#pragma unroll
    for (int i = threadIdx.x; i < Config::TOKEN_CHUNKS; i += Config::THREADS) {
      const int row = i / Config::ROW_CHUNKS;
      const int chunk = i % Config::ROW_CHUNKS;
      const int token = token_tile * Config::TILE_M + row;
      const int k = k_tile * Config::TILE_K + chunk * Config::CHUNK;
      // Elements that exist. Not a clamp of p_.k - k to 0..CHUNK: of that, ptxas 13.0 makes one
      // VIMNMX.RELU on sm_90 whose predicate takes negative numbers for whole chunks.
      int count = 0;
      if (token < p_.m && k < p_.k) count = p_.k - k < Config::CHUNK ? p_.k - k : Config::CHUNK;
      const Activation* source = p_.activations + (count > 0 ? token * p_.row_stride + k : 0);
      uint4* target = &shared_.activations[stage][swizzled<Config>(row, chunk)];
      if (Config::EIGHT_BIT || aligned_bytes_ == 16) {
        ptx::cp_async_16(target, source, count * static_cast<int>(sizeof(Activation)));
      } else {
        load_unaligned(target, source, count);
      }
    }
  }

  // Rows that do not start on 16 bytes: copies of 4 bytes, or of single elements through registers.
  // The latter are complete at once, which the ring's barriers order like any earlier completion.
  __device__ __forceinline__ void load_unaligned(uint4* target, const Activation* source,
                                                 int count) {
    if (aligned_bytes_ == 4) {
#pragma unroll
      for (int pair = 0; pair < Config::CHUNK / 2; ++pair) {
        const int left = count - 2 * pair;
        const int bytes = left >= 2 ? 4 : left == 1 ? 2 : 0;
        ptx::cp_async_4(reinterpret_cast<uint32_t*>(target) + pair,
                        bytes > 0 ? source + 2 * pair : p_.activations, bytes);
      }
      return;
    }
    const unsigned short* elements = reinterpret_cast<const unsigned short*>(source);
    uint32_t words[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t low = 2 * pair < count ? elements[2 * pair] : 0;
      const uint32_t high = 2 * pair + 1 < count ? elements[2 * pair + 1] : 0;
      words[pair] = low | high << 16;
    }
    *target = uint4{words[0], words[1], words[2], words[3]};
  }

  // Activations in the order of the weights' rows, element by element through registers.
  __device__ __forceinline__ void gather_activations(int stage, int token_tile, int k_tile) {
#pragma unroll
    for (int i = threadIdx.x; i < Config::TOKEN_CHUNKS; i += Config::THREADS) {
      const int row = i / Config::ROW_CHUNKS;
      const int chunk = i % Config::ROW_CHUNKS;
      const int token = token_tile * Config::TILE_M + row;
      const int k = k_tile * Config::TILE_K + chunk * Config::CHUNK;
      uint32_t words[4] = {};
      if (token < p_.m && k < p_.k_padded) {
        const int4* columns = reinterpret_cast<const int4*>(p_.permutation + k);
        const int4 low = columns[0], high = columns[1];
        const int column[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const unsigned short* elements =
            reinterpret_cast<const unsigned short*>(p_.activations) + token * p_.row_stride;
        uint32_t element[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) element[e] = column[e] >= 0 ? elements[column[e]] : 0;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair)
          words[pair] = element[2 * pair] | element[2 * pair + 1] << 16;
      }
      shared_.activations[stage][swizzled<Config>(row, chunk)] =
          uint4{words[0], words[1], words[2], words[3]};
    }
  }

  // Rows of scales or of zero points of the groups in a k tile, ROW chunks of each.
  template <int ROW>
  __device__ __forceinline__ void load_rows(uint4* target, const void* matrix, int column_tile,
                                            int k_tile) {
    const int first_group = k_tile * Config::TILE_K / Config::GROUP_SIZE;
    const int groups = ceil_div(p_.k_padded, Config::GROUP_SIZE);
    const int row_chunks = p_.n_padded / WARP_FEATURES * (ROW / Config::WARPS_N);
    const char* bytes = static_cast<const char*>(matrix);
#pragma unroll
    for (int i = threadIdx.x; i < Config::SCALE_ROWS * ROW; i += Config::THREADS) {
      const int group = first_group + i / ROW;
      const int chunk = column_tile * ROW + i % ROW;
      const bool inside = group < groups && chunk < row_chunks;
      const long long at = inside ? static_cast<long long>(group) * row_chunks + chunk : 0;
      ptx::cp_async_16(target + i, bytes + at * CHUNK_BYTES, inside ? 16 : 0);
    }
  }

  const Problem<Config>& p_;
  SharedStorage<Config>& shared_;
  int aligned_bytes_;
};

}  // namespace sm80
