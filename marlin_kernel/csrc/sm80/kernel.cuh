// C[M, N] = A[M, K] W[K, N] (+ bias) by mma.sync and cp.async, for every type of weights and
// activations. Runs on sm_80 and everything newer, and on sm_75 with copies through registers. The
// grid may have any size; see partition.cuh for who does what.
#pragma once

#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"
#include "sm80/epilogue.cuh"
#include "sm80/load.cuh"
#include "sm80/mainloop.cuh"
#include "sm80/partition.cuh"
#include "sm80/reduce.cuh"
#include "sm80/shared_storage.cuh"
#include "sm80/tile_config.cuh"

namespace sm80 {

// The next k tile to copy: walks through the same units as the multiplication, STAGES - 1 tiles
// ahead of it and across the borders of units, so the ring never drains inside a kernel.
class LoadCursor {
 public:
  __device__ LoadCursor(const Partition& partition, int block)
      : partition_(partition), block_(block) {
    next_unit();
  }
  __device__ bool more() const { return more_; }
  __device__ const Unit& unit() const { return unit_; }
  __device__ int k_tile() const { return k_tile_; }
  __device__ __forceinline__ void advance() {
    if (++k_tile_ == unit_.k_end) next_unit();
  }

 private:
  __device__ void next_unit() {
    more_ = partition_.unit(block_, index_++, unit_);
    k_tile_ = unit_.k_begin;
  }

  const Partition& partition_;
  int block_;
  int index_ = 0;
  Unit unit_ = {};
  int k_tile_ = 0;
  bool more_ = false;
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, 1)
    gemm(const __grid_constant__ Problem<Config> problem) {
  SharedStorage<Config>& shared = ptx::shared_memory<SharedStorage<Config>>();
  const Partition partition(ceil_div(problem.m, Config::TILE_M),
                            ceil_div(problem.n, Config::TILE_N),
                            ceil_div(problem.k_padded, Config::TILE_K), problem.splits,
                            problem.in_turn, gridDim.x);
  const WarpPlace<Config> place;
  Loader<Config> loader(problem, shared);
  LoadCursor ahead(partition, blockIdx.x);

  // An empty group is committed when nothing is left to copy: the count of groups stays the count
  // of tiles.
  auto load_next = [&](int stage) {
    if (ahead.more()) {
      loader.load(stage, ahead.unit().token_tile, ahead.unit().column_tile, ahead.k_tile());
      ahead.advance();
    }
    ptx::cp_async_commit();
  };
  for (int stage = 0; stage < Config::STAGES - 1; ++stage) load_next(stage);

  BlockReduction<Config> reduction(problem, partition, place);
  Epilogue<Config> epilogue(problem, shared, place);
  Accumulators<Config> acc;
  Unit unit = {};
  int stage = 0;
  for (int index = 0; partition.unit(blockIdx.x, index, unit); ++index) {
    acc.clear();
    for (int k_tile = unit.k_begin; k_tile < unit.k_end; ++k_tile) {
      ptx::cp_async_wait<Config::STAGES - 2>();  // this thread's share of `stage` has landed
      // Now everyone's has; and the stage before it, refilled next, is no longer read.
      ptx::block_sync();
      load_next(stage == 0 ? Config::STAGES - 1 : stage - 1);
      multiply_stage<Config>(shared, stage, place, acc);
      stage = stage == Config::STAGES - 1 ? 0 : stage + 1;
    }
    reduce_in_block<Config>(shared, place, acc);
    if (place.warp_k > 0) continue;
    if constexpr (Config::REDUCE_HALF) epilogue.scale(unit, acc);
    if (reduction.complete(unit, acc)) epilogue.write(unit, acc);
  }
  ptx::cp_async_wait<0>();
}

}  // namespace sm80
