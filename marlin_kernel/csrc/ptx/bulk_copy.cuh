// Copies by the bulk copy engine from global to shared memory, completing on an mbarrier (sm_90).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-bulk-copy
#pragma once

#include "common/types.cuh"

// A tensor map as the driver encodes it; passed to kernels by value as a __grid_constant__
// parameter.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

namespace ptx {

// elect.sync: true in exactly one lane of the converged warp. Unlike a test of the lane index it
// lets the compiler keep addresses in uniform registers, where the copy instructions want them.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-elect-sync
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// The same value in all lanes, as the compiler can see.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

// cp.async.bulk: `bytes` (a multiple of 16) contiguous bytes; both addresses 16-byte aligned.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// cp.async.bulk with multicast: likewise into every block of the cluster whose bit of `blocks` is
// set, at the same offsets; each one's barrier counts its bytes.
__device__ __forceinline__ void bulk_copy_to_cluster(void* shared, const void* global,
                                                     uint32_t bytes, uint64_t* barrier,
                                                     uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// cp.async.bulk.tensor.2d: the box of `map` whose first element is (column, row); elements outside
// the tensor arrive as zeros and count as bytes.
__device__ __forceinline__ void tensor_copy_2d(void* shared, const TensorMap* map, int column,
                                               int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// prefetch.tensormap: the map will be needed soon.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

}  // namespace ptx
