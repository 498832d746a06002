// Redistribution of registers between the warpgroups of a block (sm_90a).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-setmaxnreg
#pragma once

#include "common/types.cuh"

namespace ptx {

// setmaxnreg.dec: this warpgroup keeps `Count` registers per thread and returns the rest.
template <int Count>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Count));
}

// setmaxnreg.inc: this warpgroup gets `Count` registers per thread, once others have released
// enough.
template <int Count>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Count));
}

}  // namespace ptx
