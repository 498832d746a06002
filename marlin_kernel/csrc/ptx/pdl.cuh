// Programmatic dependent launch: a kernel may start while its predecessor in the stream still runs
// (sm_90).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
#pragma once

#include "common/types.cuh"

namespace ptx {

// griddepcontrol.launch_dependents: the next kernel in the stream may start as far as this block is
// concerned.
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

// griddepcontrol.wait: returns when the preceding kernels have completed and their writes are
// visible.
__device__ __forceinline__ void wait_for_predecessors() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

}  // namespace ptx
