// The sm_80 kernel without what sm_75 lacks: products of k 8 (fp16) and k 16 (int8), and copies
// through registers (ptx/mma.cuh, ptx/mma_8bit.cuh, ptx/cp_async.cuh). Runs on every GPU from sm_75
// on.
#pragma once

#define MARLIN_SM75
#include "sm80/kernel.cuh"
