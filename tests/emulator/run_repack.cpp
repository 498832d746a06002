// Runs the repacking kernels under the emulator.
#include "repack/repack.cuh"

namespace {
template <class Source, bool Permuted>
int run(unsigned seed, int grid, const repack::Problem& p) {
  return emu::launch({unsigned(grid)}, {repack::BLOCK_WARPS * kWarpSize},
                     sizeof(repack::Storage<Source>), 1, seed,
                     [=] { repack::repack<Source, Permuted>(p); });
}
template <class Source>
int run(unsigned seed, int grid, const repack::Problem& p) {
  return p.permutation ? run<Source, true>(seed, grid, p) : run<Source, false>(seed, grid, p);
}
}  // namespace

// source: gptq4, gptq8, awq, transposed4, transposed8
extern "C" __attribute__((visibility("default"))) int run_repack(int source, unsigned seed, int grid,
                                                                 const repack::Problem* p) {
  switch (source) {
    case 0: return run<repack::Gptq<4>>(seed, grid, *p);
    case 1: return run<repack::Gptq<8>>(seed, grid, *p);
    case 2: return run<repack::Awq, false>(seed, grid, *p);
    case 3: return run<repack::Transposed<4>>(seed, grid, *p);
    case 4: return run<repack::Transposed<8>>(seed, grid, *p);
  }
  return -1;
}

extern "C" __attribute__((visibility("default"))) int shared_bytes(int source) {
  switch (source) {
    case 0: return sizeof(repack::Storage<repack::Gptq<4>>);
    case 1: return sizeof(repack::Storage<repack::Gptq<8>>);
    case 2: return sizeof(repack::Storage<repack::Awq>);
    case 3: return sizeof(repack::Storage<repack::Transposed<4>>);
    case 4: return sizeof(repack::Storage<repack::Transposed<8>>);
  }
  return -1;
}
