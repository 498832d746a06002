// The yardstick of benchmarks: a kernel that only reads bytes. No kernel that needs those bytes is
// faster.
#pragma once

#include "common/types.cuh"
#include "ptx/pdl.cuh"

namespace sm90 {

constexpr int kFloorThreads = 512;
constexpr int kFloorUnroll = 4;

// Reads `chunks` 16-byte chunks; `sink` is written only if their XOR has an impossible value.
__global__ void __launch_bounds__(kFloorThreads)
    read_floor_kernel(const uint4* data, long long chunks, uint32_t* sink) {
  ptx::launch_dependents();
  uint32_t mix = 0;
  const long long step = static_cast<long long>(gridDim.x) * kFloorThreads;
  long long i = static_cast<long long>(blockIdx.x) * kFloorThreads + threadIdx.x;
  for (; i + (kFloorUnroll - 1) * step < chunks; i += kFloorUnroll * step) {
    uint4 v[kFloorUnroll];
#pragma unroll
    for (int u = 0; u < kFloorUnroll; ++u) v[u] = __ldcs(data + i + u * step);
#pragma unroll
    for (int u = 0; u < kFloorUnroll; ++u) mix ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < chunks; i += step) {
    const uint4 v = __ldcs(data + i);
    mix ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  ptx::wait_for_predecessors();
  if (mix == 0x9e3779b9u && chunks < 0) *sink = mix;
}

}  // namespace sm90
