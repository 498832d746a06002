// Runs the kernels that prepare activations under the emulator.
#include "sm80/activations.cuh"

namespace {
template <class Scalar, class Code>
int quantize(unsigned seed, int grid, const sm80::QuantizeProblem& p) {
  return emu::launch({unsigned(grid)}, {sm80::PREPARE_THREADS}, sizeof(sm80::QuantizeStorage), 1,
                     seed, [=] { sm80::quantize_activations<Scalar, Code>(p); });
}
}  // namespace

// kind: fp16 to int8, fp16 to e4m3, bf16 to int8, bf16 to e4m3
extern "C" __attribute__((visibility("default"))) int run_quantize(
    int kind, unsigned seed, int grid, const sm80::QuantizeProblem* p) {
  switch (kind) {
    case 0: return quantize<__half, int8_t>(seed, grid, *p);
    case 1: return quantize<__half, float8_e4m3>(seed, grid, *p);
    case 2: return quantize<__nv_bfloat16, int8_t>(seed, grid, *p);
    case 3: return quantize<__nv_bfloat16, float8_e4m3>(seed, grid, *p);
  }
  return -1;
}

extern "C" __attribute__((visibility("default"))) int run_gather(unsigned seed, int grid,
                                                                 const sm80::GatherProblem* p) {
  return emu::launch({unsigned(grid)}, {sm80::PREPARE_THREADS}, 16, 1, seed,
                     [=] { sm80::gather_activations<8>(*p); });
}
