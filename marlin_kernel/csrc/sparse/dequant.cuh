// Integer codes to A fragments of 16-bit values, for the 2:4 sparse kernel.
//
// A word of 4-bit codes holds a whole fragment of 16 features x 16 kept values: code e of register
// r (ptx/wgmma_sparse.cuh) has the bits 4 (r / 2 + 2 (r % 2)) + 16 e. Two words of 8-bit codes hold
// one: code e of register r is byte r / 2 + 2 e of word r % 2. These places make every register two
// or three instructions.
#pragma once

#include "common/types.cuh"
#include "ptx/bit_ops.cuh"
#include "sparse/config.cuh"

namespace sparse {

// What thread 0 .. 127 holds of a tile: codes of each instruction, positions of two each.
template <class Layout>
__device__ __forceinline__ void load_codes(uint32_t (&words)[kSteps][Layout::STEP_WORDS],
                                           uint32_t (&positions)[2], const uint8_t* tile,
                                           int thread) {
#pragma unroll
  for (int i = 0; i < Layout::CODE_WORDS / 4; ++i) {
    const uint4 v =
        *reinterpret_cast<const uint4*>(tile + thread * Layout::CODE_WORDS * 4 + i * 16);
    uint32_t* target = &words[0][0] + 4 * i;
    target[0] = v.x, target[1] = v.y, target[2] = v.z, target[3] = v.w;
  }
  const uint2 pair = *reinterpret_cast<const uint2*>(tile + Layout::CODE_BYTES + thread * 8);
  positions[0] = pair.x;
  positions[1] = pair.y;
}

// Exact values code - 8 of a word of eight 4-bit codes.
//
// fp16: 0x6400 | c is 1024 + c, and c shifted by four bits gives 1024 + 16 c, whose sixteenth is
// 64 + c: one fused multiply-add. bf16 has seven bits of mantissa: 0x4300 | c is 128 + c.
__device__ __forceinline__ void codes_to_fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  __half) {
  constexpr uint32_t kMagic = 0x64006400, kMinus1032 = 0xe408e408;
  constexpr uint32_t kSixteenth = 0x2c002c00, kMinus72 = 0xd480d480;
  const uint32_t w = words[0], high = w >> 8;
  a[0] = ptx::add2(ptx::and_or(w, 0x000f000f, kMagic), kMinus1032, __half());
  a[2] = ptx::fma2(ptx::and_or(w, 0x00f000f0, kMagic), kSixteenth, kMinus72, __half());
  a[1] = ptx::add2(ptx::and_or(high, 0x000f000f, kMagic), kMinus1032, __half());
  a[3] = ptx::fma2(ptx::and_or(high, 0x00f000f0, kMagic), kSixteenth, kMinus72, __half());
}
__device__ __forceinline__ void codes_to_fragment(uint32_t (&a)[4], const uint32_t (&words)[1],
                                                  __nv_bfloat16 type) {
  constexpr uint32_t kMagic = 0x43004300, kMinus136 = 0xc308c308;
  const uint32_t w = words[0];
  a[0] = ptx::add2(ptx::and_or(w, 0x000f000f, kMagic), kMinus136, type);
  a[2] = ptx::add2(ptx::and_or(w >> 4, 0x000f000f, kMagic), kMinus136, type);
  a[1] = ptx::add2(ptx::and_or(w >> 8, 0x000f000f, kMagic), kMinus136, type);
  a[3] = ptx::add2(ptx::and_or(w >> 12, 0x000f000f, kMagic), kMinus136, type);
}

// Exact values code - 128 of two words of four 8-bit codes.
//
// fp16: the byte under 0x64 is 1024 + c. bf16 cannot hold 1024 + c; c ^ 128 is the two's complement
// of c - 128, so its low seven bits under 0x43 are 128 + (c & 127), and the difference of 128 or
// 256 goes by the top bit.
__device__ __forceinline__ void codes_to_fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  __half) {
  constexpr uint32_t kMagic = 0x64646464, kMinus1152 = 0xe480e480;
#pragma unroll
  for (int r = 0; r < 4; ++r)
    a[r] = ptx::add2(ptx::permute_bytes(words[r % 2], kMagic, r / 2 ? 0x4341 : 0x4240), kMinus1152,
                     __half());
}
__device__ __forceinline__ void codes_to_fragment(uint32_t (&a)[4], const uint32_t (&words)[2],
                                                  __nv_bfloat16 type) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t pair = ptx::permute_bytes(words[r % 2], 0, r / 2 ? 0x4341 : 0x4240);
    // 0x4300 | low bits is 128 + low; a set top bit means code = 128 + low, so code - 128 = low:
    // subtract 128; else code = low, code - 128 = low - 128: subtract 256.
    const uint32_t value = ptx::and_or(pair, 0x007f007f, 0x43004300);
    const uint32_t less = 0xc380c380 ^ (pair & 0x00800080);  // -256, or -128 (0xc300)
    a[r] = ptx::add2(value, less, type);
  }
}

// Multiply a fragment by the scales of its rows g and g + 8.
template <class Scalar>
__device__ __forceinline__ void scale_fragment(uint32_t (&a)[4], const uint32_t (&scales)[2]) {
  a[0] = ptx::mul2(a[0], scales[0], Scalar());
  a[1] = ptx::mul2(a[1], scales[1], Scalar());
  a[2] = ptx::mul2(a[2], scales[0], Scalar());
  a[3] = ptx::mul2(a[3], scales[1], Scalar());
}

// Scales of a tile (config.cuh) of rows 16 m + lane / 4 and 8 further.
__device__ __forceinline__ __half2 tile_scales(const uint8_t* scales, int m, int lane) {
  return reinterpret_cast<const __half2*>(scales)[lane / 4 * 4 + m];
}

// An fp16 scale, twice, as a pair of the compute type.
__device__ __forceinline__ uint32_t scale_pair(__half scale, __half) {
  const __half2 pair = __halves2half2(scale, scale);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t scale_pair(__half scale, __nv_bfloat16) {
  const __nv_bfloat16 wide = __float2bfloat16_rn(__half2float(scale));
  const __nv_bfloat162 pair = __halves2bfloat162(wide, wide);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace sparse
