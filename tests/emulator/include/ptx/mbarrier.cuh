// Emulated csrc/ptx/mbarrier.cuh.
#pragma once

#include "common/types.cuh"

namespace ptx {

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  emu::check_shared(barrier, 8);
  emu::require(arrivals > 0 && arrivals < 0x7fff, "mbarrier: count of arrivals");
  emu::MBarrier m = {};
  m.expected = m.pending = arrivals;
  memcpy(barrier, &m, 8);
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier) { emu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  emu::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  emu::mbarrier_wait(barrier, parity);
}

}  // namespace ptx
