// Runs the sm_90a kernels for 8-bit activations under the emulator. Compiled with
// -DCASES="X(0, ...) ...", one X per configuration: its number and its template arguments.
#include "sm90_8bit/kernel.cuh"

namespace {
struct Arguments {
  const void *a, *scale_a, *scale_b, *bias, *weights;
  void* out;
  int scale_b_stride, m, n, columns, k_tiles, feature_tiles;
};

template <class Config>
int run_case(unsigned seed, int grid, int shared_bytes, const Arguments& a) {
  using Out = typename Config::Out;
  sm90_8bit::Problem<Out> p = {};
  p.scale_a = static_cast<const float*>(a.scale_a);
  p.scale_b = static_cast<const float*>(a.scale_b);
  p.bias = static_cast<const Out*>(a.bias);
  p.out = static_cast<Out*>(a.out);
  p.weights = static_cast<const uint8_t*>(a.weights);
  p.scale_a_stride = 1;
  p.scale_b_stride = a.scale_b_stride;
  p.m = a.m;
  p.n = a.n;
  p.k_tiles = a.k_tiles;
  p.feature_tiles = a.feature_tiles;
  const emu::ByteMatrix tokens = {static_cast<const char*>(a.a), a.columns, a.columns, a.m,
                                  scaled::kStageK, Config::TOKENS / Config::MULTICAST};
  TensorMap map = {};
  memcpy(&map, &tokens, sizeof(tokens));
  return emu::launch({unsigned(grid)}, {Config::THREADS}, shared_bytes, Config::CLUSTER, seed,
                     [=] { sm90_8bit::gemm_kernel<Config>(p, map); });
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* violation() {
  return emu::S.violation.c_str();
}

#define X(number, ...) \
  case number:         \
    return run_case<sm90_8bit::Config<__VA_ARGS__>>(seed, grid, shared_bytes, *a);
extern "C" __attribute__((visibility("default"))) int run(int config, unsigned seed, int grid,
                                                          int shared_bytes, const Arguments* a) {
  switch (config) { CASES }
  return -1;
}
#undef X
