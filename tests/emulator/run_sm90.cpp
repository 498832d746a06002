// Runs the sm_90 kernels under the emulator. Compiled with -DDECODE_CASES="X(0, ...) ...",
// -DDECODE_GATHER_CASES (which gather activations) and -DGEMM_CASES, one X per configuration: its
// number and its template arguments.
#include "sm90/decode.cuh"
#include "sm90/gemm.cuh"

namespace {
struct Arguments {
  const void *activations, *weights, *scales, *bias;
  void *out, *partials, *counters;
  const void *global_scale, *permutation;
  long long row_stride;
  int m, n, k, column_tiles, k_tiles, split, whole_tiles;
};

template <class Scalar>
sm90::Problem<Scalar> problem_of(const Arguments& a) {
  sm90::Problem<Scalar> p = {};
  p.activations = static_cast<const Scalar*>(a.activations);
  p.weights = static_cast<const uint8_t*>(a.weights);
  p.scales = static_cast<const uint8_t*>(a.scales);
  p.bias = static_cast<const Scalar*>(a.bias);
  p.out = static_cast<Scalar*>(a.out);
  p.row_stride = a.row_stride;
  p.m = a.m;
  p.n = a.n;
  p.k = a.k;
  p.column_tiles = a.column_tiles;
  p.k_tiles = a.k_tiles;
  p.split = a.split;
  p.whole_tiles = a.whole_tiles;
  p.partials = static_cast<float*>(a.partials);
  p.counters = static_cast<int*>(a.counters);
  p.global_scale = static_cast<const float*>(a.global_scale);
  return p;
}

template <class Config>
int decode(unsigned seed, dim3 grid, int shared_bytes, const Arguments& a) {
  const auto p = problem_of<typename Config::Scalar>(a);
  return emu::launch(grid, {Config::THREADS}, shared_bytes, Config::SPLIT, seed,
                     [=] { sm90::decode_kernel<Config>(p); });
}

template <class Config>
int decode_gather(unsigned seed, dim3 grid, int shared_bytes, const Arguments& a) {
  const auto p = problem_of<typename Config::Scalar>(a);
  const int* permutation = static_cast<const int*>(a.permutation);
  return emu::launch(grid, {Config::THREADS}, shared_bytes, Config::SPLIT, seed,
                     [=] { sm90::decode_gather_kernel<Config>(p, permutation); });
}

template <class Config>
int gemm(unsigned seed, dim3 grid, int shared_bytes, const Arguments& a) {
  const auto p = problem_of<typename Config::Scalar>(a);
  const emu::Matrix matrix = {static_cast<const char*>(a.activations),
                              a.row_stride * 2,
                              a.k,
                              a.m,
                              sm90::kTileK,
                              Config::TOKENS,
                              true};
  TensorMap map = {};
  memcpy(&map, &matrix, sizeof(matrix));
  return emu::launch(grid, {Config::THREADS}, shared_bytes, Config::CLUSTER, seed,
                     [=] { sm90::gemm_kernel<Config>(p, map); });
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* violation() {
  return emu::S.violation.c_str();
}

#define ENTRY(name, cases)                                                                         \
  extern "C" __attribute__((visibility("default"))) int run_##name(                                \
      int config, unsigned seed, int grid_x, int grid_y, int shared_bytes, const Arguments* a) {   \
    const dim3 grid = {unsigned(grid_x), unsigned(grid_y), 1};                                     \
    switch (config) { cases }                                                                      \
    return -1;                                                                                     \
  }
#define X(number, ...) \
  case number:         \
    return decode<sm90::DecodeConfig<__VA_ARGS__>>(seed, grid, shared_bytes, *a);
ENTRY(decode, DECODE_CASES)
#undef X
#define X(number, ...)                                                                      \
  case number:                                                                              \
    return decode_gather<sm90::Gathering<sm90::DecodeConfig<__VA_ARGS__>>>(seed, grid,       \
                                                                           shared_bytes, *a);
ENTRY(decode_gather, DECODE_GATHER_CASES)
#undef X
#define X(number, ...) \
  case number:         \
    return gemm<sm90::GemmConfig<__VA_ARGS__>>(seed, grid, shared_bytes, *a);
ENTRY(gemm, GEMM_CASES)
#undef X
