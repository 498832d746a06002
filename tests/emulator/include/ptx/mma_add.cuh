// Emulated csrc/ptx/mma_add.cuh.
#pragma once

#include "common/types.cuh"
#include "ptx/mma.cuh"

namespace ptx {

template <class Scalar>
inline void mma_add_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4], Scalar type) {
  float sum[4] = {c[0], c[1], c[2], c[3]};
  mma_m16n8k16(sum, a, b, type);
  for (int i = 0; i < 4; i++) d[i] = sum[i];
}

}  // namespace ptx
