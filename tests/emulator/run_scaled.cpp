// Runs the scaled GEMM kernels under the emulator. Compiled with -DCASES="X(0, ...) ...", one X per
// configuration: its number and its template arguments.
#include "scaled/kernel.cuh"

namespace {
struct Arguments {
  const void *a, *b, *scale_a, *scale_b, *bias, *metadata;
  void* out;
  long long a_row, b_row;
  int scale_a_stride, scale_b_stride, m, n, a_columns, b_columns, k_tiles, feature_tiles;
};

template <class Config>
int run_case(unsigned seed, int grid, int shared_bytes, const Arguments& a) {
  using Out = typename Config::Out;
  scaled::Problem<Out> p = {};
  p.scale_a = static_cast<const float*>(a.scale_a);
  p.scale_b = static_cast<const float*>(a.scale_b);
  p.bias = static_cast<const Out*>(a.bias);
  p.out = static_cast<Out*>(a.out);
  p.metadata = static_cast<const uint8_t*>(a.metadata);
  p.scale_a_stride = a.scale_a_stride;
  p.scale_b_stride = a.scale_b_stride;
  p.m = a.m;
  p.n = a.n;
  p.k_tiles = a.k_tiles;
  p.feature_tiles = a.feature_tiles;
  const emu::ByteMatrix weights = {static_cast<const char*>(a.b), a.b_row, a.b_columns, a.n,
                                   Config::WEIGHT_ROW, Config::FEATURES};
  const emu::ByteMatrix tokens = {static_cast<const char*>(a.a),  a.a_row, a.a_columns, a.m,
                                  scaled::kStageK, Config::TOKENS / Config::MULTICAST};
  scaled::Maps maps = {};
  memcpy(&maps.weights, &weights, sizeof(weights));
  memcpy(&maps.tokens, &tokens, sizeof(tokens));
  return emu::launch({unsigned(grid)}, {Config::THREADS}, shared_bytes, Config::CLUSTER, seed,
                     [=] { scaled::scaled_kernel<Config>(p, maps); });
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* violation() {
  return emu::S.violation.c_str();
}

#define X(number, ...) \
  case number:         \
    return run_case<scaled::Config<__VA_ARGS__>>(seed, grid, shared_bytes, *a);
extern "C" __attribute__((visibility("default"))) int run(int config, unsigned seed, int grid,
                                                          int shared_bytes, const Arguments* a) {
  switch (config) { CASES }
  return -1;
}
#undef X
