// Runs the sm_80 kernel under the emulator. Compiled with -DCONFIG_CASES="X(0, ...) X(1, ...)", one
// X per configuration: its number and its template arguments.
#include "sm80/kernel.cuh"

namespace {
struct Arguments {
  const void *activations, *weights, *scales, *zeros, *permutation, *token_scales, *global_scale,
      *bias;
  void *output, *partials, *arrivals;
  long long row_stride;
  int m, n, k, n_padded, k_padded, splits, in_turn;
};

template <class Config>
int run(unsigned seed, int grid, const Arguments& a) {
  using Scalar = typename Config::Scalar;
  const sm80::Problem<Config> problem = {
      static_cast<const typename Config::Activation*>(a.activations),
      static_cast<const uint4*>(a.weights),
      a.scales,
      a.zeros,
      static_cast<const int*>(a.permutation),
      static_cast<const float*>(a.token_scales),
      static_cast<const float*>(a.global_scale),
      static_cast<const Scalar*>(a.bias),
      static_cast<Scalar*>(a.output),
      a.partials,
      static_cast<int*>(a.arrivals),
      a.row_stride,
      a.m,
      a.n,
      a.k,
      a.n_padded,
      a.k_padded,
      a.splits,
      a.in_turn};
  static_assert(sizeof(problem) == sizeof(a), "the launcher packs the same fields");
  return emu::launch({unsigned(grid)}, {Config::THREADS}, sizeof(sm80::SharedStorage<Config>), 1,
                     seed, [=] { sm80::gemm<Config>(problem); });
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* violation() {
  return emu::S.violation.c_str();
}

extern "C" __attribute__((visibility("default"))) int shared_bytes(int config) {
  switch (config) {
#define X(number, ...) \
  case number:         \
    return sizeof(sm80::SharedStorage<sm80::TileConfig<__VA_ARGS__>>);
    CONFIG_CASES
#undef X
  }
  return -1;
}

extern "C" __attribute__((visibility("default"))) int run_gemm(int config, unsigned seed, int grid,
                                                               const Arguments* a) {
  switch (config) {
#define X(number, ...) \
  case number:         \
    return run<sm80::TileConfig<__VA_ARGS__>>(seed, grid, *a);
    CONFIG_CASES
#undef X
  }
  return -1;
}
