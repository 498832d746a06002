// Packed codes of checkpoints -> the words of the Marlin layout (FORMAT.md), bit for bit what
// packing.pack makes of the same codes.
//
// A warp takes 64 inputs x 64 outputs at a time: whole 32-byte sectors of every source. It copies
// their words into shared memory, and every lane picks the codes of its own words: 16-byte stores of
// consecutive lanes are consecutive. Rows that are permuted (act-order) are read from where they lie.
#pragma once

#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/shared_memory.cuh"

namespace repack {

constexpr int BLOCK_WARPS = 4;
constexpr int TILE = 64;        // inputs and outputs of a warp's share
constexpr int PACKED_K = 16;    // inputs of a packed tile

struct Problem {
  const uint32_t* source;      // packed codes
  const int* permutation;      // [K]: input of each row of the result, or null
  const unsigned char* zeros;  // [groups, N] zero points that fill rows from K on, or null
  uint32_t* words;             // [K' / 16, N' * bits / 2]
  int k, n;                    // real sizes
  int k_padded, n_padded;      // multiples of 64
  int group_size, groups;      // of `zeros`
  int fill;                    // code of the padding
};

// GPTQ: [K * bits / 32, N], codes of consecutive inputs in a word.
template <int Bits>
struct Gptq {
  static constexpr int BITS = Bits;
  static constexpr int PER_WORD = 32 / Bits;
  static constexpr int ROWS = TILE / PER_WORD, COLUMNS = TILE;  // words of a share
  static __device__ __forceinline__ int rows(const Problem& p) { return p.k / PER_WORD; }
  static __device__ __forceinline__ int columns(const Problem& p) { return p.n; }
  static __device__ __forceinline__ int row_of(int k, int) { return k / PER_WORD; }
  static __device__ __forceinline__ int column_of(int, int n) { return n; }
  static __device__ __forceinline__ int shift_of(int k, int) { return k % PER_WORD * Bits; }
};

// AWQ: [K, N / 8], eight outputs in a word: nibble i is that of output {0, 2, 4, 6, 1, 3, 5, 7}[i].
struct Awq {
  static constexpr int BITS = 4;
  static constexpr int ROWS = TILE, COLUMNS = TILE / 8;
  static __device__ __forceinline__ int rows(const Problem& p) { return p.k; }
  static __device__ __forceinline__ int columns(const Problem& p) { return p.n / 8; }
  static __device__ __forceinline__ int row_of(int k, int) { return k; }
  static __device__ __forceinline__ int column_of(int, int n) { return n / 8; }
  static __device__ __forceinline__ int shift_of(int, int n) { return (n % 8 / 2 + n % 2 * 4) * 4; }
};

// compressed-tensors: [N, ceil(K * bits / 32)], codes of consecutive inputs in a word.
template <int Bits>
struct Transposed {
  static constexpr int BITS = Bits;
  static constexpr int PER_WORD = 32 / Bits;
  static constexpr int ROWS = TILE, COLUMNS = TILE / PER_WORD;
  static __device__ __forceinline__ int rows(const Problem& p) { return p.n; }
  static __device__ __forceinline__ int columns(const Problem& p) { return ceil_div(p.k, PER_WORD); }
  static __device__ __forceinline__ int row_of(int, int n) { return n; }
  static __device__ __forceinline__ int column_of(int k, int) { return k / PER_WORD; }
  static __device__ __forceinline__ int shift_of(int k, int) { return k % PER_WORD * Bits; }
};

template <class Source>
struct Storage {
  static constexpr int PITCH = Source::COLUMNS + (Source::COLUMNS < TILE ? 1 : 0);  // fewer conflicts
  uint32_t words[BLOCK_WARPS][Source::ROWS * PITCH];
};

template <class Source>
class Share {
 public:
  __device__ __forceinline__ Share(const Problem& p, uint32_t* staged, int k_first, int n_first, int lane)
      : p_(p), staged_(staged), k_first_(k_first), n_first_(n_first), lane_(lane) {}

  __device__ __forceinline__ void stage() const {
    const int first_row = Source::row_of(k_first_, n_first_);
    const int first_column = Source::column_of(k_first_, n_first_);
    const int rows = Source::rows(p_), columns = Source::columns(p_);
#pragma unroll
    for (int i = lane_; i < Source::ROWS * Source::COLUMNS; i += kWarpSize) {
      const int r = i / Source::COLUMNS, c = i % Source::COLUMNS;
      const bool inside = first_row + r < rows && first_column + c < columns;
      staged_[r * Storage<Source>::PITCH + c] =
          inside ? p_.source[static_cast<long long>(first_row + r) * columns + first_column + c] : 0;
    }
  }

  // The code of row k and column n of this share, staged or (permuted) from global memory.
  template <bool Permuted>
  __device__ __forceinline__ uint32_t code(int k, int n, bool interior) const {
    constexpr uint32_t kMask = (1u << Source::BITS) - 1;
    if (!interior && (n_first_ + n >= p_.n || k_first_ + k >= p_.k)) return fill(k, n);
    if constexpr (Permuted) {
      const int from = p_.permutation[k_first_ + k], column = n_first_ + n;
      const long long at =
          static_cast<long long>(Source::row_of(from, column)) * Source::columns(p_) +
          Source::column_of(from, column);
      return p_.source[at] >> Source::shift_of(from, column) & kMask;
    } else {
      const int at = Source::row_of(k, n) * Storage<Source>::PITCH + Source::column_of(k, n);
      return staged_[at] >> Source::shift_of(k, n) & kMask;
    }
  }

 private:
  __device__ __forceinline__ uint32_t fill(int k, int n) const {
    if (p_.zeros == nullptr || n_first_ + n >= p_.n) return p_.fill;
    const int group = (k_first_ + k) / p_.group_size;
    if (group >= p_.groups) return p_.fill;
    return p_.zeros[static_cast<long long>(group) * p_.n + n_first_ + n];
  }

  const Problem& p_;
  uint32_t* staged_;
  int k_first_, n_first_, lane_;
};

template <class Source, bool Permuted>
__global__ void __launch_bounds__(BLOCK_WARPS* kWarpSize)
    repack(const __grid_constant__ Problem p) {
  constexpr int kBits = Source::BITS;
  constexpr int kCodes = 32 / kBits;       // of a word
  constexpr int kLaneWords = kBits;        // of one lane in a packed tile
  constexpr int kTileWords = kLaneWords * kWarpSize;
  // offsets (k, n) of the codes in a word, low bits first
  constexpr int kRows[8] = {0, 8, kBits == 4 ? 0 : 1, kBits == 4 ? 8 : 9, 1, 9, 1, 9};
  constexpr int kColumns[8] = {0, 0, kBits == 4 ? 8 : 0, kBits == 4 ? 8 : 0, 0, 0, 8, 8};
  constexpr int kWordColumns = TILE / kLaneWords;  // columns of word j of all lanes: 16 or 8
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  Storage<Source>& storage = ptx::shared_memory<Storage<Source>>();
  const int column_blocks = p.n_padded / TILE;
  const int shares = column_blocks * (p.k_padded / TILE);
  const int step = gridDim.x * BLOCK_WARPS;
  for (int i = blockIdx.x * BLOCK_WARPS + warp; i < shares; i += step) {
    const int block = i % column_blocks;
    const int k_first = i / column_blocks * TILE;
    const int n_first = block * TILE;
    const Share<Source> share(p, storage.words[warp], k_first, n_first, lane);
    const bool interior = n_first + TILE <= p.n && k_first + TILE <= p.k;
    if constexpr (!Permuted) {
      ptx::warp_sync();  // the lanes have read what was staged before
      share.stage();
      ptx::warp_sync();
    }
#pragma unroll 1
    for (int tile = 0; tile < TILE / PACKED_K; ++tile) {
      uint32_t words[kLaneWords];
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        const int k = tile * PACKED_K + 2 * (lane % 4);
        const int n = j * kWordColumns + lane / 4;
        uint32_t word = 0;
#pragma unroll
        for (int c = 0; c < kCodes; ++c)
          word |= share.template code<Permuted>(k + kRows[c], n + kColumns[c], interior)
                  << (c * kBits);
        words[j] = word;
      }
      const long long row = k_first / PACKED_K + tile;
      uint4* to = reinterpret_cast<uint4*>(p.words + (row * column_blocks + block) * kTileWords) +
                  lane * (kLaneWords / 4);
#pragma unroll
      for (int part = 0; part < kLaneWords / 4; ++part)
        to[part] = uint4{words[4 * part], words[4 * part + 1], words[4 * part + 2],
                         words[4 * part + 3]};
    }
  }
}

}  // namespace repack
