// The part of CUDA's language and headers that the kernels use, for g++.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../emulator.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(n) alignas(n)
#define __cluster_dims__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

#define threadIdx (emu::S.fiber->thread)
#define blockIdx (emu::S.fiber->block->index)
#define blockDim (emu::S.block)
#define gridDim (emu::S.grid)

typedef _Float16 __half;
typedef _Float16 half;
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half low, __half high) : x(low), y(high) {}
};
typedef __half2 half2;

namespace emu {
// half -> float by table: the library routine behind the conversion is ten times slower.
inline const float* half_table() {
  static float* table = [] {
    float* t = new float[65536];
    for (uint32_t i = 0; i < 65536; i++) {
      const uint16_t bits = i;
      _Float16 h;
      memcpy(&h, &bits, 2);
      t[i] = float(h);
    }
    return t;
  }();
  return table;
}
inline float half_bits_to_float(uint16_t bits) {
  static const float* const table = half_table();
  return table[bits];
}
inline uint16_t float_to_half_bits(double v) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}
}  // namespace emu

inline __half __float2half_rn(float v) { return static_cast<__half>(v); }
inline __half __float2half(float v) { return static_cast<__half>(v); }
inline float __half2float(__half v) { return static_cast<float>(v); }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned __float_as_uint(float v) {
  unsigned u;
  memcpy(&u, &v, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float v;
  memcpy(&v, &u, 4);
  return v;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

inline void __syncthreads() { emu::barrier(0, emu::S.fiber->block->threads); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int atomicAdd(int* p, int v) {
  const int old = *p;
  *p += v;
  return old;
}
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  const unsigned old = *p;
  *p += v;
  return old;
}

namespace emu {
inline uint32_t shuffle(uint32_t value, int source) {
  const int slot = collective([&](Warp& w, int s) { w.in[s][lane()][0] = value; },
                              [](Warp& w, int s) {
                                for (int l = 0; l < kWarp; l++) w.out[s][l][0] = w.in[s][l][0];
                              });
  return warp().out[slot][source % kWarp][0];
}
inline void warp_barrier() {
  collective([](Warp&, int) {}, [](Warp&, int) {});
}
}  // namespace emu
inline void __syncwarp(unsigned = ~0u) { emu::warp_barrier(); }
template <class T>
inline T __shfl_sync(unsigned, T value, int source, int = 32) {
  static_assert(sizeof(T) == 4, "32-bit shuffles only");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = emu::shuffle(bits, source);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int = 32) {
  return __shfl_sync(mask, value, emu::lane() ^ lanes);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int = 32) {
  const int source = emu::lane() + lanes < 32 ? emu::lane() + lanes : emu::lane();
  return __shfl_sync(mask, value, source);
}
