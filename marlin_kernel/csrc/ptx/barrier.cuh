// Barriers between threads of a block, warp-level exchange, and ordering between blocks.
#pragma once

#include "common/types.cuh"

namespace ptx {

// bar.sync 0: all threads of the block.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 0;\n" ::: "memory"); }

// bar.sync id, threads: the `threads` (a multiple of 32) threads that name barrier `id` (1..15).
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// bar.arrive id, threads: count as arrived without waiting for the others.
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// bar.warp.sync: all 32 lanes; orders their shared-memory accesses.
__device__ __forceinline__ void warp_sync() {
  asm volatile("bar.warp.sync 0xffffffff;\n" ::: "memory");
}

// shfl.sync.idx: the value that `lane` holds; all 32 lanes take part.
__device__ __forceinline__ int shuffle(int value, int lane) {
  int result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;\n"
               : "=r"(result)
               : "r"(value), "r"(lane));
  return result;
}

// membar.gl: this thread's earlier writes are visible to the device before its later ones.
__device__ __forceinline__ void device_fence() {
  asm volatile("fence.acq_rel.gpu;\n" ::: "memory");
}

// atom.add: returns the old value; ordered for the whole device by the fences around it.
__device__ __forceinline__ int atomic_add(int* address, int value) {
  int old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;\n"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
}

// Wait until another block has brought a counter to `value`; what was written before that (and fenced)
// is visible then.
__device__ __forceinline__ void wait_for_count(const int* counter, int value) {
  int found;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(found) : "l"(counter) : "memory");
  } while (found != value);
}

// ld.relaxed.gpu: 16 bytes from L2, never from this multiprocessor's L1, which other blocks' writes
// do not reach.
__device__ __forceinline__ float4 load_l2(const float4* address) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// The same of 8 bytes.
__device__ __forceinline__ uint2 load_l2(const uint2* address) {
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(v.x), "=r"(v.y)
               : "l"(address)
               : "memory");
  return v;
}

// st.global.cg: 8 bytes into L2.
__device__ __forceinline__ void store_l2(uint2* address, uint2 v) {
  asm volatile("st.global.cg.v2.u32 [%0], {%1, %2};\n" ::"l"(address), "r"(v.x), "r"(v.y)
               : "memory");
}

// st.global.cg: 16 bytes into L2.
__device__ __forceinline__ void store_l2(float4* address, float4 v) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(address), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

}  // namespace ptx
