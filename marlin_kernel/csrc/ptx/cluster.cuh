// Thread block clusters: barrier, rank, and the shared memory of the other blocks (sm_90).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#cluster-of-cooperative-thread-arrays
#pragma once

#include "common/types.cuh"

namespace ptx {

// %cluster_ctarank: this block's rank among the blocks of its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive.release / wait.acquire: every thread of every block of the cluster takes
// part in both.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// st.shared::cluster: 16 bytes to the same offset as `local` in the shared memory of block `rank`.
__device__ __forceinline__ void store_remote(void* local, uint32_t rank, float4 v) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(shared_address(local)),
      "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

// st.shared::cluster: 8 bytes likewise.
__device__ __forceinline__ void store_remote(void* local, uint32_t rank, float2 v) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v2.f32 [remote], {%2, %3};\n"
      "}\n" ::"r"(shared_address(local)),
      "r"(rank), "f"(v.x), "f"(v.y)
      : "memory");
}

// ld.shared::cluster: 16 bytes from the same offset as `local` in the shared memory of block
// `rank`.
__device__ __forceinline__ float4 load_remote(const void* local, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n"
      "}\n"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(local)), "r"(rank)
      : "memory");
  return v;
}

}  // namespace ptx
