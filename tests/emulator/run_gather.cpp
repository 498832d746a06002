// Runs the kernels of csrc/sm90/gather.cuh under the emulator.
#include "sm90/gather.cuh"

namespace {
template <class Config>
int run(unsigned seed, int grid_x, int grid_y, int shared_bytes, const sm90::GatherProblem& p) {
  return emu::launch({unsigned(grid_x), unsigned(grid_y)}, {Config::THREADS}, shared_bytes,
                     Config::CLUSTER, seed, [=] { sm90::gather_kernel<Config>(p); });
}

template <int THREADS>
int run_pick(unsigned seed, int grid_x, int grid_y, const sm90::GatherProblem& p) {
  return emu::launch({unsigned(grid_x), unsigned(grid_y)}, {THREADS}, 0, 1, seed,
                     [=] { sm90::pick_kernel<THREADS>(p); });
}
}  // namespace

extern "C" __attribute__((visibility("default"))) int run_gather(int threads, int rows, int cluster,
                                                                 unsigned seed, int grid_x,
                                                                 int grid_y, int shared_bytes,
                                                                 const sm90::GatherProblem* p) {
  if (threads == 256 && rows == 1 && cluster == 1)
    return run<sm90::GatherConfig<256, 1, 1>>(seed, grid_x, grid_y, shared_bytes, *p);
  if (threads == 256 && rows == 2 && cluster == 1)
    return run<sm90::GatherConfig<256, 2, 1>>(seed, grid_x, grid_y, shared_bytes, *p);
  if (threads == 128 && rows == 1 && cluster == 2)
    return run<sm90::GatherConfig<128, 1, 2>>(seed, grid_x, grid_y, shared_bytes, *p);
  if (threads == 128 && rows == 1 && cluster == 4)
    return run<sm90::GatherConfig<128, 1, 4>>(seed, grid_x, grid_y, shared_bytes, *p);
  if (threads == 128 && rows == 1 && cluster == 8)
    return run<sm90::GatherConfig<128, 1, 8>>(seed, grid_x, grid_y, shared_bytes, *p);
  if (threads == 32 && rows == 0) return run_pick<32>(seed, grid_x, grid_y, *p);
  return -1;
}
