// Copies of boxes of 8-bit elements by the copy engine, into this block's shared memory or into
// that of every block of a cluster, and arrivals at the barriers of other blocks (sm_90).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"

namespace ptx {

// cp.async.bulk.tensor.2d of 8-bit elements: the box of `map` whose first element is (column, row).
__device__ __forceinline__ void byte_tensor_copy(void* shared, const TensorMap* map, int column,
                                                 int row, uint64_t* barrier) {
  tensor_copy_2d(shared, map, column, row, barrier);
}

// The same into the blocks of the cluster whose bits are set in `blocks`, at the same offset of
// each; the bytes complete on the barrier at the same offset of each.
__device__ __forceinline__ void byte_tensor_multicast(void* shared, const TensorMap* map,
                                                      int column, int row, uint64_t* barrier,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// mbarrier.arrive at the barrier that lies at the offset of `local` in block `rank` of the cluster.
// Without .release.cluster: nothing that this thread wrote is handed over, and that fence halves the
// speed of the scaled GEMM (8192 x 8192 x 8192 FP8 2:4 on an H200: 954 us instead of 525).
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* local, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(local)),
      "r"(rank)
      : "memory");
}

}  // namespace ptx
