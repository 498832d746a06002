// A ring of shared-memory stages that asynchronous copies fill and warpgroups read.
#pragma once

#include "common/types.cuh"

namespace common {

// Position in the ring: stage index and the parity of its barriers' phase.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace common
