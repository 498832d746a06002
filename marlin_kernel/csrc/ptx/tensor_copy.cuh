// Copies of boxes of 8-bit elements by the copy engine, into this block's shared memory or into
// that of every block of a cluster (sm_90).
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
  tensor_multicast_2d(shared, map, column, row, barrier, blocks);
}

}  // namespace ptx
