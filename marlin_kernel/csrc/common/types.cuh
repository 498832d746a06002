// Names that every kernel header uses: fixed-width integers (the compiler at run time has no
// <cstdint>), type traits, the constants of a warp, and the map from an element type to its packed
// pair.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

constexpr int kWarpSize = 32;

// A byte that holds a float8_e4m3fn.
struct float8_e4m3 {
  uint8_t bits;
};

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
constexpr bool kIsSame<A, A> = true;

// Quotient rounded up, of non-negative integers.
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

#ifdef __CUDACC__
// The 32-bit address by which instructions name a byte of this block's shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Conversions between fp32 and the 16-bit element type of a kernel.
template <class T>
struct Element;

template <>
struct Element<__half> {
  using Pair = __half2;
  static __device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }
  static __device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
};

template <>
struct Element<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ __nv_bfloat16 from_float(float v) {
    return __float2bfloat16_rn(v);
  }
  static __device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
};
