// Asynchronous copies from global to shared memory (sm_80 and newer), and their completion groups.
#pragma once

#include "common/types.cuh"

namespace ptx {

// cp.async: copies `bytes` (0..16) from global memory and fills the rest of the 16 bytes with
// zeros. Both addresses are 16-byte aligned; nothing is read when bytes == 0. Bypasses L1.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// cp.async of 4 bytes (both addresses 4-byte aligned): `bytes` (0..4) are read, the rest is zero.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// cp.async.commit_group: all copies of this thread since the last commit become one group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// cp.async.wait_group: returns when at most `Pending` groups of this thread are still under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

}  // namespace ptx
