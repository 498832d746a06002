// What the sm_90 kernels compute and how dense weights lie in device memory. (2:4 sparse weights:
// sparse/config.cuh, whose small-batch kernel takes the same Problem with tiles of 128 k.)
//
//   out[M, N] = activations[M, K] * W[K, N] (+ bias)
//   W[k, n] = (value(code[k, n]) - zero[k / group, n]) * scale[k / group, n] (* global scale)
//
// Roles are swapped, C^T = W^T A^T: output features are the rows of the matrix instruction, tokens
// its columns, so a single token wastes 7 columns and not 63 rows, and the weights of a lane are
// exactly what that lane feeds to the instruction.
//
// Weights: tiles of 64 features x 64 k, in pairs of neighbouring columns (the last pair has one column
//   if N'/64 is odd). What a lane holds of the A fragment of rows 16 m .. 16 m + 15 and k 16 kk ..
//   16 kk + 15 is one word of 4-bit codes, or two of 8-bit codes, for rows g and g + 8 (h = 0, 1; see
//   dequant/dequantizer.cuh):
//     4 bits   b[N'/128 pairs][K'/64][2 columns][4 m][32 lanes][4 kk]
//     8 bits   b[N'/128 pairs][K'/64][2 columns][4 m][2 kk / 2][32 lanes][2 kk % 2][2 h]
//   A 16-byte load gives a lane its share of 16 features x 64 (8 bits: 32) k.
// Rows of groups: scales and stored zero points of 64 features and one group, side by side. The rows
//   of a tile (several for groups of fewer than 64 k) lie together:
//     s[N'/128 pairs][tiles or groups][2 columns][rows of a tile][scales | zero points]
//   scales: [8 g][4 m][2 h], that of feature 16 m + 8 h + g in fp16, e4m3 or e8m0: the eight that a
//   lane with g = lane / 4 needs are contiguous. Zero points of uint8 and (fp16) of HQQ likewise; the
//   eight nibbles of uint4 are one word [8 g], h the higher bit of their place.
//   Without groups: fp16 scales, one row of each column.
#pragma once

#include "common/types.cuh"
#include "common/weight_types.cuh"

namespace sm90 {

constexpr int kTileN = 64;             // features of a weight tile
constexpr int kTileK = 64;             // k of a weight tile
constexpr int kStepsPerTile = 4;       // k steps of 16 in it
template <class Weight>
constexpr int kTileBytes = kTileN * kTileK * Weight::BITS / 8;  // of its codes
template <class Weight>
constexpr int kLaneWords = Weight::BITS / 4;  // words of a fragment that one lane holds
template <class Weight>
constexpr int kScaleRowBytes = 8 * kScaleBytes<Weight>;  // scales of one group of a column
template <class Weight>
constexpr int kRowBytes = kScaleRowBytes<Weight> + 8 * kZeroBytes<Weight>;  // and its zero points

template <class Scalar>
struct Problem {
  const Scalar* activations;  // [m, k], rows `row_stride` elements apart
  const uint8_t* weights;     // as above
  const uint8_t* scales;      // rows of groups, as above
  const Scalar* bias;         // [n] or null
  Scalar* out;                // [m, n], contiguous
  long long row_stride;       // elements between rows of activations
  int m;                      // tokens
  int n;                      // features that exist
  int k;                      // k that exist
  int column_tiles;           // N' / 64
  int k_tiles;                // K' / 64
  int split;                  // parts of the k range, when several blocks share a tile of outputs;
                              // at most so many where stretches of k differ (gemm_config.cuh, SPREAD)
  int whole_tiles;            // so many tiles come first and are not split
  float* partials;            // their sums, if split > 1
  int* counters;              // of finished parts; zero before and after
  const float* global_scale;  // one number, of types that have e4m3 scales
};

// How rows of groups accompany tiles. GROUP: k values that share a scale (16, 32, 64, 128), 0: the
// whole column.
template <class Weight, int GROUP>
struct RowLayout {
  static_assert(GROUP == 0 || GROUP == 16 || GROUP == 32 || GROUP == 64 || GROUP == 128,
                "groups are whole columns, 16, 32, 64 or 128 k");
  static_assert(GROUP != 0 || (Weight::ZEROS == Zeros::NONE && Weight::SCALES == Scales::HALF),
                "one scale per column is applied to the sums: fp16, without zero points");
  static constexpr int kPerTile = GROUP == 0 ? 0 : GROUP < kTileK ? kTileK / GROUP : 1;
  static constexpr int kTilesPerGroup = GROUP > kTileK ? GROUP / kTileK : 1;
  static constexpr int kBytesPerTile = kPerTile * kRowBytes<Weight>;
  // Bytes of one column's rows that lie together: those of a tile.
  static constexpr int kUnitBytes = GROUP == 0 ? kRowBytes<Weight> : kBytesPerTile;

  // Such units of one column of `k_tiles` tiles. The last group of a type with zero points, whose
  // single group is repeated, may be cut short.
  static __device__ __forceinline__ int units(int k_tiles) {
    if (GROUP == 0) return 1;
    return Weight::ZEROS == Zeros::NONE ? k_tiles / kTilesPerGroup
                                        : ceil_div(k_tiles, kTilesPerGroup);
  }
  // Unit of a tile.
  static __device__ __forceinline__ int unit_of(int k_tile) { return k_tile / kTilesPerGroup; }
};

// A pair of neighbouring columns of tiles; the last one may have a single member.
struct ColumnPair {
  int first;  // column tile
  int width;  // 1 or 2
  __device__ __forceinline__ ColumnPair(int pair, int column_tiles)
      : first(2 * pair), width(min(2, column_tiles - 2 * pair)) {}

  // Offset of item `index` of this pair's first column, in items of which every column has `count`
  // (tiles, or units of rows); the second column's follows.
  __device__ __forceinline__ long long offset(int index, int count) const {
    return static_cast<long long>(first) * count + index * width;
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
