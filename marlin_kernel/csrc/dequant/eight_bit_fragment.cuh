// Codes to the A operand of wgmma with 8-bit activations (ptx/wgmma_8bit_registers.cuh).
//
// A lane holds, of each 16 k, four codes of row g and four of row g + 8. The words are made for this
// kernel when a layer is loaded (sm90_8bit_layout.py), so that masks are all they need:
//
// uint4b8, int8    byte i: code of row g in the lower nibble, of row g + 8 in the upper, both minus 8
//                  in two's complement. In the upper nibble of a byte that is 16 (q - 8).
// uint4, int8      the same nibbles, not shifted by 8. With z the zero point, 128 + q - z fits a byte
//                  for every pair, so bytes do not borrow from each other; bit 7 flipped, that is
//                  q - z. Stored are bytes 128 - z.
// uint4b8, e4m3    bits 7, 2..0 of byte i for row g; bit 3 of byte i + 1 and bits 6..4 of byte i for
//                  row g + 8: the sign s and the lower bits of the magnitude |q - 8| - s. Bytes
//                  0 .. 15 of e4m3 are 0 .. 15 times 2^-9 (subnormals, and the first binade above
//                  them), so magnitude plus sign bit is the number, 2^9 times too small.
// 8 bits           two words, those of row g and of row g + 8, as the instruction takes them: q - 128,
//                  or e4m3 as it is.
//
//   Fragment<Weight, Operand>::UNIT                  a weight is UNIT * its byte * scale; the host
//                                                    multiplies it into the scales of the output
//   rows(low, high, word, zeros)                     4 bits: low: row g, high: row g + 8
#pragma once

#include "common/types.cuh"
#include "common/weight_types.cuh"
#include "ptx/bit_ops.cuh"
#include "ptx/wgmma_8bit.cuh"

namespace dequant {

template <class Weight, class Operand>
struct Fragment;

template <>
struct Fragment<weights::uint4b8, ptx::Int8> {
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high, uint32_t word,
                                              const uint32_t*) {
    low = word << 4 & 0xf0f0f0f0;
    high = word & 0xf0f0f0f0;
  }
};

template <>
struct Fragment<weights::uint4, ptx::Int8> {
  // zeros: 128 - z in all four bytes, of row g and of row g + 8
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high, uint32_t word,
                                              const uint32_t* zeros) {
    low = ((word & 0x0f0f0f0f) + zeros[0]) ^ 0x80808080;
    high = ((word >> 4 & 0x0f0f0f0f) + zeros[1]) ^ 0x80808080;
  }
};

template <>
struct Fragment<weights::uint4b8, ptx::Float8> {
  static __device__ __forceinline__ void rows(uint32_t& low, uint32_t& high, uint32_t word,
                                              const uint32_t*) {
    low = row(word);
    high = row(word >> 4 | word << 28);
  }

 private:
  static __device__ __forceinline__ uint32_t row(uint32_t word) {
    return (word & 0x87878787) + ((word & 0x80808080) >> 7);
  }
};

}  // namespace dequant
