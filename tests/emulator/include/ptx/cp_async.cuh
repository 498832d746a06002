// Emulated csrc/ptx/cp_async.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline void cp_async_16(void* shared, const void* global, int bytes) {
  emu::start_copy({shared, global, bytes, 16 - bytes});
}
inline void cp_async_4(void* shared, const void* global, int bytes) {
  emu::start_copy({shared, global, bytes, 4 - bytes});
}
inline void cp_async_commit() { emu::commit_copies(); }
template <int Pending>
inline void cp_async_wait() {
  emu::wait_copies(Pending);
}

}  // namespace ptx
