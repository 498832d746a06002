// Emulated csrc/ptx/pdl.cuh: launches do not overlap here.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline void launch_dependents() {}
inline void wait_for_predecessors() {}

}  // namespace ptx
