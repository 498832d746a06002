// What both sm_90 kernels compute and how the weights lie in device memory.
//
//   out[M, N] = activations[M, K] * W[K, N] (+ bias)
//   W[k, n] = (code[k, n] - 8) * scale[k / group, n]
//
// Roles are swapped, C^T = W^T A^T: output features are the rows of the matrix instruction, tokens
// its columns, so a single token wastes 7 columns and not 63 rows, and the weights of a lane are
// exactly what that lane feeds to the instruction.
//
// Weights: tiles of 64 features x 64 k, 2048 bytes each, in pairs of neighbouring columns:
//   b[N'/128 pairs][K'/64][2 columns][4 m][32 lanes][4 kk]   (the last pair has one column if N'/64
//   is odd). Word (m, lane, kk) holds the A fragment of rows 16 m .. 16 m + 15 and of k 16 kk ..
//   16 kk + 15 (see dequant/int4.cuh): a 16-byte load gives a lane its share of 16 features x 64 k.
// Scales: fp16, of feature 16 m + 8 h + g in s[N'/128 pairs][groups][2 columns][8 g][4 m][2 h]:
//   the eight scales that a lane with g = lane / 4 needs are 16 contiguous bytes.
#pragma once

#include "common/types.cuh"

namespace sm90 {

constexpr int kTileN = 64;             // features of a weight tile
constexpr int kTileK = 64;             // k of a weight tile
constexpr int kTileBytes = 2048;       // bytes of its codes
constexpr int kStepsPerTile = 4;       // k steps of 16 in it
constexpr int kScaleRowBytes = 128;    // fp16 scales of one group of a 64-feature column

template <class Scalar>
struct Problem {
  const Scalar* activations;  // [m, k], rows `row_stride` elements apart
  const uint8_t* weights;     // as above
  const uint8_t* scales;      // as above
  const Scalar* bias;         // [n] or null
  Scalar* out;                // [m, n], contiguous
  long long row_stride;       // elements between rows of activations
  int m;                      // tokens
  int n;                      // features that exist
  int k;                      // k that exist
  int column_tiles;           // N' / 64
  int k_tiles;                // K' / 64
  int split;                  // parts of the k range, when several blocks share a tile of outputs
  int whole_tiles;            // so many tiles come first and are not split
  float* partials;            // their sums, if split > 1
  int* counters;              // of finished parts; zero before and after
};

// How scales accompany tiles. GROUP: k values that share a scale (32, 64, 128), 0: the whole
// column.
template <int GROUP>
struct ScaleLayout {
  static_assert(GROUP == 0 || GROUP == 32 || GROUP == 64 || GROUP == 128,
                "groups are whole columns, 32, 64 or 128 k");
  static constexpr int kPerTile = GROUP == 0 ? 0 : GROUP < kTileK ? kTileK / GROUP : 1;
  static constexpr int kTilesPerGroup = GROUP > kTileK ? GROUP / kTileK : 1;
  static constexpr int kBytesPerTile = kPerTile * kScaleRowBytes;

  // Groups of one column of `k_tiles` tiles.
  static __device__ __forceinline__ int groups(int k_tiles) {
    return GROUP == 0 ? 1 : GROUP < kTileK ? k_tiles * kPerTile : k_tiles / kTilesPerGroup;
  }
  // First group of a tile.
  static __device__ __forceinline__ int group_of(int k_tile) {
    return GROUP < kTileK ? k_tile * kPerTile : k_tile / kTilesPerGroup;
  }
};

// A pair of neighbouring columns of tiles; the last one may have a single member.
struct ColumnPair {
  int first;  // column tile
  int width;  // 1 or 2
  __device__ __forceinline__ ColumnPair(int pair, int column_tiles)
      : first(2 * pair), width(min(2, column_tiles - 2 * pair)) {}

  // Byte offset of tile `k_tile` of this pair's first column; the second column's follows.
  __device__ __forceinline__ long long tile_offset(int k_tile, int k_tiles) const {
    return (static_cast<long long>(first) * k_tiles + k_tile * width) * kTileBytes;
  }
  // Byte offset of group `group`'s scales, likewise.
  __device__ __forceinline__ long long scale_offset(int group, int groups) const {
    return (static_cast<long long>(first) * groups + group * width) * kScaleRowBytes;
  }
};

// Half-open range of `total` items that part `index` of `parts` works on; sizes differ by at most
// one.
struct Range {
  int begin, end;
  __device__ __forceinline__ Range(int total, int index, int parts)
      : begin(static_cast<int>(static_cast<long long>(total) * index / parts)),
        end(static_cast<int>(static_cast<long long>(total) * (index + 1) / parts)) {}
  __device__ __forceinline__ int size() const { return end - begin; }
};

// Index of feature n in per-column scales (one group).
__device__ __forceinline__ int column_scale_index(int n) {
  const int f = n % kTileN;
  return n - f + (f % 8) * 8 + (f / 16) * 2 + (f / 8) % 2;
}

}  // namespace sm90
