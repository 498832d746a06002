// Emulated csrc/ptx/barrier.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline void block_sync() { emu::barrier(0, emu::S.fiber->block->threads); }
inline void named_sync(int id, int threads) { emu::barrier(id, threads); }
inline void named_arrive(int id, int threads) { emu::barrier_arrive(id, threads); }
inline void warp_sync() { emu::warp_barrier(); }
inline int shuffle(int value, int lane) { return emu::shuffle(value, lane); }
inline void device_fence() {}
inline int atomic_add(int* address, int value) { return atomicAdd(address, value); }
inline void wait_for_count(const int* counter, int value) {
  while (*static_cast<const volatile int*>(counter) != value) emu::yield();
}
inline float4 load_l2(const float4* address) { return *address; }
inline uint2 load_l2(const uint2* address) { return *address; }
inline void store_l2(uint2* address, uint2 v) { *address = v; }
inline void store_l2(float4* address, float4 v) { *address = v; }

}  // namespace ptx
