// Emulated csrc/ptx/shared_memory.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

template <class Storage>
inline Storage& shared_memory() {
  emu::require(sizeof(Storage) <= emu::S.shared_bytes, "launched with too little shared memory");
  return *reinterpret_cast<Storage*>(emu::S.fiber->block->shared);
}

}  // namespace ptx
