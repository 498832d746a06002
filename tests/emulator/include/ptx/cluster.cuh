// Emulated csrc/ptx/cluster.cuh. A cluster is a run of neighbouring blocks along x.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline uint32_t cluster_rank() { return emu::cluster_rank(); }
inline void cluster_arrive() { emu::cluster_arrive(); }
inline void cluster_wait() { emu::cluster_wait(); }
inline void store_remote(void* local, uint32_t rank, float4 v) {
  emu::check_shared(local, 16);
  memcpy(emu::remote(local, rank), &v, 16);
}
inline void store_remote(void* local, uint32_t rank, float2 v) {
  emu::check_shared(local, 8);
  memcpy(emu::remote(local, rank), &v, 8);
}
inline float4 load_remote(const void* local, uint32_t rank) {
  emu::check_shared(local, 16);
  float4 v;
  memcpy(&v, emu::remote(local, rank), 16);
  return v;
}

}  // namespace ptx
