// Runs the sm_80 kernel under the emulator. Compiled with -DCONFIG_CASES="X(0, ...) X(1, ...)", one
// X per configuration: its number and its template arguments.
#include "sm80/kernel.cuh"

namespace {
template <class Config>
int run(unsigned seed, int grid, const void* activations, const void* weights, const void* scales,
        const void* bias, void* output, void* partials, int* arrivals, long long row_stride, int m,
        int n, int k, int n_padded, int k_padded, int splits, int in_turn) {
  using Scalar = typename Config::Scalar;
  const sm80::Problem<Scalar> problem = {static_cast<const Scalar*>(activations),
                                         static_cast<const uint4*>(weights),
                                         static_cast<const __half*>(scales),
                                         static_cast<const Scalar*>(bias),
                                         static_cast<Scalar*>(output),
                                         static_cast<float4*>(partials),
                                         arrivals,
                                         row_stride,
                                         m,
                                         n,
                                         k,
                                         n_padded,
                                         k_padded,
                                         splits,
                                         in_turn};
  return emu::launch({unsigned(grid)}, {Config::THREADS}, sizeof(sm80::SharedStorage<Config>), 1,
                     seed, [=] { sm80::gemm_w4a16<Config>(problem); });
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

extern "C" __attribute__((visibility("default"))) int run_gemm(
    int config, unsigned seed, int grid, const void* activations, const void* weights,
    const void* scales, const void* bias, void* output, void* partials, int* arrivals,
    long long row_stride, int m, int n, int k, int n_padded, int k_padded, int splits,
    int in_turn) {
  switch (config) {
#define X(number, ...)                                                                           \
  case number:                                                                                   \
    return run<sm80::TileConfig<__VA_ARGS__>>(seed, grid, activations, weights, scales, bias,    \
                                              output, partials, arrivals, row_stride, m, n, k,   \
                                              n_padded, k_padded, splits, in_turn);
    CONFIG_CASES
#undef X
  }
  return -1;
}
