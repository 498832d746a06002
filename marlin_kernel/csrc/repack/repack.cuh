// Packed codes of checkpoints -> the words of the Marlin layout (FORMAT.md), bit for bit what
// packing.pack makes of the same codes.
//
// A warp takes 64 inputs x 64 outputs at a time: whole 32-byte sectors of every source. It copies
// their words into shared memory such that a lane reads with 16 bytes the words of outputs lane / 4,
// lane / 4 + 8, ... (no bank conflicts), picks the bytes that hold its inputs and puts them in order.
// Consecutive lanes store consecutive 16 bytes. At the edges, and where rows are permuted (act-order),
// codes are read one by one.
#pragma once

#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bit_ops.cuh"
#include "ptx/shared_memory.cuh"

namespace repack {

constexpr int BLOCK_WARPS = 8;
constexpr int TILE = 64;        // inputs and outputs of a warp's share
constexpr int PACKED_K = 16;    // inputs of a packed tile
constexpr int OUTPUTS = 8;      // words n = g, g + 8, ... of one g lie side by side in shared memory
constexpr int OUTPUTS_PITCH = 12;

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

// Sources: ROWS x COLUMNS words of a share, and where in shared memory word (r, c) of them goes.

// Where words that hold consecutive inputs of one output are staged: `row` of inputs, output n.
template <int Pitch>
__device__ __forceinline__ int staged_outputs(int row, int n) {
  return row * Pitch + n % 8 * OUTPUTS_PITCH + n / 8;
}

// GPTQ: [K * bits / 32, N], codes of consecutive inputs in a word.
template <int Bits>
struct Gptq {
  static constexpr int BITS = Bits;
  static constexpr int PER_WORD = 32 / Bits;
  static constexpr int ROWS = TILE / PER_WORD, COLUMNS = TILE;
  static constexpr int PITCH = 8 * OUTPUTS_PITCH, STAGED = ROWS * PITCH;
  static __device__ __forceinline__ int rows(const Problem& p) { return p.k / PER_WORD; }
  static __device__ __forceinline__ int columns(const Problem& p) { return p.n; }
  static __device__ __forceinline__ int row_of(int k, int) { return k / PER_WORD; }
  static __device__ __forceinline__ int column_of(int, int n) { return n; }
  static __device__ __forceinline__ int shift_of(int k, int) { return k % PER_WORD * Bits; }
  static __device__ __forceinline__ int staged(int r, int c) { return staged_outputs<PITCH>(r, c); }
};

// AWQ: [K, N / 8], eight outputs in a word: nibble i is that of output {0, 2, 4, 6, 1, 3, 5, 7}[i].
struct Awq {
  static constexpr int BITS = 4;
  static constexpr int ROWS = TILE, COLUMNS = TILE / 8;
  static constexpr int PITCH = OUTPUTS_PITCH, STAGED = ROWS * PITCH;
  static __device__ __forceinline__ int rows(const Problem& p) { return p.k; }
  static __device__ __forceinline__ int columns(const Problem& p) { return p.n / 8; }
  static __device__ __forceinline__ int row_of(int k, int) { return k; }
  static __device__ __forceinline__ int column_of(int, int n) { return n / 8; }
  static __device__ __forceinline__ int shift_of(int, int n) { return (n % 8 / 2 + n % 2 * 4) * 4; }
  static __device__ __forceinline__ int staged(int r, int c) { return r * PITCH + c; }
};

// compressed-tensors: [N, ceil(K * bits / 32)], codes of consecutive inputs in a word.
template <int Bits>
struct Transposed {
  static constexpr int BITS = Bits;
  static constexpr int PER_WORD = 32 / Bits;
  static constexpr int ROWS = TILE, COLUMNS = TILE / PER_WORD;
  static constexpr int PITCH = 8 * OUTPUTS_PITCH + 4, STAGED = COLUMNS * PITCH;
  static __device__ __forceinline__ int rows(const Problem& p) { return p.n; }
  static __device__ __forceinline__ int columns(const Problem& p) { return ceil_div(p.k, PER_WORD); }
  static __device__ __forceinline__ int row_of(int, int n) { return n; }
  static __device__ __forceinline__ int column_of(int k, int) { return k / PER_WORD; }
  static __device__ __forceinline__ int shift_of(int k, int) { return k % PER_WORD * Bits; }
  static __device__ __forceinline__ int staged(int r, int c) { return staged_outputs<PITCH>(c, r); }
};

template <class Source>
struct alignas(16) Storage {
  uint32_t words[BLOCK_WARPS][Source::STAGED];
};

// words[i] = staged[i]: of outputs n = g + 8 i.
__device__ __forceinline__ void load_outputs(uint32_t (&words)[OUTPUTS], const uint32_t* staged) {
  const uint4* from = reinterpret_cast<const uint4*>(staged);
  const uint4 low = from[0], high = from[1];
  words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
  words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
}

// Byte `selector` (0..3, in both digits: b | (b + 4) << 4) of a, b, c and d.
__device__ __forceinline__ uint32_t four_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                               uint32_t selector) {
  return ptx::permute_bytes(ptx::permute_bytes(a, b, selector), ptx::permute_bytes(c, d, selector),
                            0x5410);
}

// The low nibbles of the bytes of `low`, then those of `high`, in order.
__device__ __forceinline__ uint32_t join_nibbles(uint32_t low, uint32_t high) {
  low &= 0x0f0f0f0f;
  high &= 0x0f0f0f0f;
  return ptx::permute_bytes(low | low >> 4, high | high >> 4, 0x6420);
}

// The words of this lane (t = lane % 4, g = lane / 4) in packed tile `tile` of a staged share. Of 4
// bits, word j has the inputs k = 2t, 2t + 8 of outputs n = 16 j + g and n + 8, then the same for
// k + 1; of 8 bits, the inputs 2t, 2t + 8, 2t + 1, 2t + 9 of output 8 j + g.
template <class Source>
__device__ __forceinline__ void tile_words(const uint32_t* staged, int tile, int lane,
                                           uint32_t (&words)[Source::BITS]) {
  const int t = lane % 4, g = lane / 4;
  const int tile_rows = PACKED_K * Source::BITS / 32;
  const uint32_t* rows = staged + tile * tile_rows * Source::PITCH + g * OUTPUTS_PITCH;
  uint32_t a[OUTPUTS], b[OUTPUTS];
  if constexpr (Source::BITS == 4) {
    load_outputs(a, rows);
    load_outputs(b, rows + Source::PITCH);
    const uint32_t selector = t * 0x11 + 0x40;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t pairs = four_bytes(a[2 * j], b[2 * j], a[2 * j + 1], b[2 * j + 1], selector);
      words[j] = join_nibbles(pairs, pairs >> 4);
    }
  } else {
    load_outputs(a, rows + t / 2 * Source::PITCH);
    load_outputs(b, rows + (t / 2 + 2) * Source::PITCH);
    const uint32_t selector = t % 2 * 0x2222 + 0x5140;
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j] = ptx::permute_bytes(a[j], b[j], selector);
  }
}

template <>
__device__ __forceinline__ void tile_words<Awq>(const uint32_t* staged, int tile, int lane,
                                                uint32_t (&words)[4]) {
  const int t = lane % 4, g = lane / 4;
  const int shift = Awq::shift_of(0, g);
  const uint32_t selector = shift / 8 * 0x11 + 0x40;
  uint32_t pairs[2][4];  // [input 2t | 2t + 1][j]
#pragma unroll
  for (int next = 0; next < 2; ++next) {
    const uint32_t* row = staged + (tile * PACKED_K + 2 * t + next) * Awq::PITCH;
    uint32_t a[OUTPUTS], b[OUTPUTS];
    load_outputs(a, row);
    load_outputs(b, row + 8 * Awq::PITCH);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      pairs[next][j] = four_bytes(a[2 * j], b[2 * j], a[2 * j + 1], b[2 * j + 1], selector) >> shift % 8;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = join_nibbles(pairs[0][j], pairs[1][j]);
}

template <class Source>
class Share {
 public:
  __device__ __forceinline__ Share(const Problem& p, uint32_t* staged, int k_first, int n_first, int lane)
      : p_(p), staged_(staged), k_first_(k_first), n_first_(n_first), lane_(lane) {}

  __device__ __forceinline__ void stage() const {
    const int first_row = Source::row_of(k_first_, n_first_);
    const int first_column = Source::column_of(k_first_, n_first_);
    const int rows = Source::rows(p_), columns = Source::columns(p_);
    auto copy = [&](int i) {
      const int r = i / Source::COLUMNS, c = i % Source::COLUMNS;
      const bool inside = first_row + r < rows && first_column + c < columns;
      staged_[Source::staged(r, c)] =
          inside ? p_.source[static_cast<long long>(first_row + r) * columns + first_column + c] : 0;
    };
    constexpr int kWords = Source::ROWS * Source::COLUMNS;
    if constexpr (Source::BITS == 4) {  // 16 loads of a lane are under way at once
#pragma unroll
      for (int i = lane_; i < kWords; i += kWarpSize) copy(i);
    } else {
#pragma unroll 16
      for (int i = lane_; i < kWords; i += kWarpSize) copy(i);
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
      const int at = Source::staged(Source::row_of(k, n), Source::column_of(k, n));
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
__global__ void __launch_bounds__(BLOCK_WARPS* kWarpSize, Source::BITS == 4 ? 3 : 2)
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
      if (!Permuted && interior) {
        tile_words<Source>(storage.words[warp], tile, lane, words);
      } else {
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
