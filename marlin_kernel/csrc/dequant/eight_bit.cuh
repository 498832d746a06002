// Codes to the A operand of products with 8-bit activations (ptx/mma_8bit.cuh).
//
// A lane's codes of one k16 tile are k = 2t, 2t+1, 2t+8, 2t+9 of each row (t = lane % 4). They become
// the four bytes of a register in this order, so byte 4t + i of a k16 tile of activations must hold
// k = 2t + {0, 1, 8, 9}[i] (quantize_activations does that): the order of k within a sum is free.
//
//   EightBit<Weight, Activation>::Sum    what products are added up in
//   EightBit<Weight, Activation>::UNIT   a weight is UNIT * its byte * scale
//   rows(low, high, words, zeros, j)     low: row g, high: row g + 8 of row tile j
//
// int8, 4 bits: a code in the upper nibble of a byte, with its top bit flipped, is 16 (q - 8). With
//   zero points: 128 + q - z fits a byte for every pair, so bytes do not borrow from each other; bit
//   7 flipped, that is q - z.
// int8, 8 bits: bit 7 flipped is q - 128.
// e4m3, 4 bits: the byte of q - 8 is looked up in tables of 8 (prmt), one for q < 8, one for q >= 8.
#pragma once

#include "dequant/dequantizer.cuh"
#include "ptx/bit_ops.cuh"

namespace dequant {

template <class Weight, class Activation>
struct EightBit;

constexpr uint32_t kTopBits = 0x80808080;

// low[0], low[2], high[0], high[2] and low[1], low[3], high[1], high[3]: from nibbles in bytes
// (even ones of a word in `low`, odd ones in `high`) to the rows g and g + 8.
__device__ __forceinline__ void nibble_rows(uint32_t& row, uint32_t& row_8, uint32_t even,
                                            uint32_t odd) {
  row = ptx::permute_bytes(even, odd, 0x6420);
  row_8 = ptx::permute_bytes(even, odd, 0x7531);
}

template <>
struct EightBit<weights::uint4b8, int8_t> {
  using Sum = int;
  static constexpr float UNIT = 1.f / 16;
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high,
                                              const uint32_t (&words)[1], const uint32_t*, int) {
    nibble_rows(low, high, (words[0] << 4 & 0xf0f0f0f0) ^ kTopBits,
                (words[0] & 0xf0f0f0f0) ^ kTopBits);
  }
};

template <>
struct EightBit<weights::uint4, int8_t> {
  using Sum = int;
  static constexpr float UNIT = 1.f;
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high,
                                              const uint32_t (&words)[1], const uint32_t* zeros,
                                              int j) {
    const uint32_t pair = zeros[0] >> (4 * j) & 0x000f000f;
    const uint32_t z = ptx::permute_bytes(pair, 0, 0x2020);
    const uint32_t even = ptx::and_or(words[0], 0x0f0f0f0f, kTopBits) - z;
    const uint32_t odd = ptx::and_or(words[0] >> 4, 0x0f0f0f0f, kTopBits) - z;
    nibble_rows(low, high, even ^ kTopBits, odd ^ kTopBits);
  }
};

template <>
struct EightBit<weights::uint8b128, int8_t> {
  using Sum = int;
  static constexpr float UNIT = 1.f;
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high,
                                              const uint32_t (&words)[2], const uint32_t*, int) {
    low = ptx::permute_bytes(words[0] ^ kTopBits, 0, 0x3120);
    high = ptx::permute_bytes(words[1] ^ kTopBits, 0, 0x3120);
  }
};

template <>
struct EightBit<weights::float8_e4m3fn, float8_e4m3> {
  using Sum = float;
  static constexpr float UNIT = 1.f;
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high,
                                              const uint32_t (&words)[2], const uint32_t*, int) {
    low = ptx::permute_bytes(words[0], 0, 0x3120);
    high = ptx::permute_bytes(words[1], 0, 0x3120);
  }
};

template <>
struct EightBit<weights::uint4b8, float8_e4m3> {
  using Sum = float;
  static constexpr float UNIT = 1.f;
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high,
                                              const uint32_t (&words)[1], const uint32_t*, int) {
    const uint32_t first = look_up(words[0]);         // nibbles 0..3: k, k+8 of g, of g + 8
    const uint32_t second = look_up(words[0] >> 16);  // nibbles 4..7: the same, next k
    low = ptx::permute_bytes(first, second, 0x5140);
    high = ptx::permute_bytes(first, second, 0x7362);
  }

 private:
  // The e4m3 bytes of (q - 8) for the four lower nibbles q.
  static __device__ __forceinline__ uint32_t look_up(uint32_t word) {
    const uint32_t index = word & 0x7777;
    const uint32_t below = ptx::permute_bytes(0xcaccced0, 0xb8c0c4c8, index);  // -8 .. -1
    const uint32_t above = ptx::permute_bytes(0x44403800, 0x4e4c4a48, index);  // 0 .. 7
    const uint32_t is_above = ptx::permute_bytes(0x0000ff00, 0, word >> 3 & 0x1111);
    return (above & is_above) | (below & ~is_above);
  }
};

}  // namespace dequant
