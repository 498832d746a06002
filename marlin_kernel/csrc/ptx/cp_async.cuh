// Asynchronous copies from global to shared memory (sm_80 and newer), and their completion groups.
// Where they do not exist (sm_75) a copy goes through registers and is complete at once.
#pragma once

#include "common/types.cuh"

namespace ptx {

#if defined(MARLIN_SM75) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  uint4 v = {};
  if (bytes == 16) {
    v = *static_cast<const uint4*>(global);
  } else {  // the end of a row: 16-bit elements
    const uint16_t* elements = static_cast<const uint16_t*>(global);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (2 * i < bytes) words[i / 2] |= static_cast<uint32_t>(elements[i]) << (i % 2 * 16);
    v = uint4{words[0], words[1], words[2], words[3]};
  }
  *static_cast<uint4*>(shared) = v;
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int bytes) {
  uint32_t v = 0;
  if (bytes == 4) v = *static_cast<const uint32_t*>(global);
  if (bytes == 2) v = *static_cast<const uint16_t*>(global);
  *static_cast<uint32_t*>(shared) = v;
}

__device__ __forceinline__ void cp_async_commit() {}

template <int Pending>
__device__ __forceinline__ void cp_async_wait() {}

#else

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

#endif

}  // namespace ptx
