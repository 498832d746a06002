// Runs the 2:4 Marlin kernels under the emulator. Compiled with -DCASES="X(0, ...) Y(1, ...) ...":
// one X per configuration of the sm_90a kernel, one Z per configuration of its small-batch kernel,
// one Y per configuration of the sm_80 kernel: its number and its template arguments.
#include "sparse/decode.cuh"
#include "sparse/kernel.cuh"
#include "sparse/sm80.cuh"

namespace {
struct Arguments {
  const void *a, *weights, *scales, *bias;
  void* out;
  long long row_stride;
  int m, n, k, k_tiles, feature_tiles;
};

template <class Config>
int run_case(unsigned seed, dim3 grid, int shared_bytes, const Arguments& a) {
  using Scalar = typename Config::Scalar;
  sparse::Problem<Scalar> p = {};
  p.weights = static_cast<const uint8_t*>(a.weights);
  p.scales = static_cast<const __half*>(a.scales);
  p.bias = static_cast<const Scalar*>(a.bias);
  p.out = static_cast<Scalar*>(a.out);
  p.m = a.m;
  p.n = a.n;
  p.k_tiles = a.k_tiles;
  p.feature_tiles = a.feature_tiles;
  const emu::Matrix matrix = {
      static_cast<const char*>(a.a), a.row_stride * 2, a.k, a.m, sparse::kBoxK, Config::TOKENS,
      true};
  TensorMap map = {};
  memcpy(&map, &matrix, sizeof(matrix));
  return emu::launch(grid, {Config::THREADS}, shared_bytes, Config::SPLIT, seed,
                     [=] { sparse::marlin24_kernel<Config>(p, map); });
}

// Of the kernels that read activations without a tensor map.
template <class Problem, class Scalar>
Problem problem_of_rows(const Arguments& a) {
  Problem p = {};
  p.activations = static_cast<const Scalar*>(a.a);
  p.weights = static_cast<const uint8_t*>(a.weights);
  p.scales = static_cast<decltype(p.scales)>(a.scales);
  p.bias = static_cast<const Scalar*>(a.bias);
  p.out = static_cast<Scalar*>(a.out);
  p.row_stride = a.row_stride;
  p.m = a.m;
  p.n = a.n;
  p.k = a.k;
  p.k_tiles = a.k_tiles;
  return p;
}

template <class Config>
int run_decode_case(unsigned seed, dim3 grid, int shared_bytes, const Arguments& a) {
  using Scalar = typename Config::Scalar;
  auto p = problem_of_rows<sm90::Problem<Scalar>, Scalar>(a);
  p.column_tiles = a.feature_tiles;
  return emu::launch(grid, {Config::THREADS}, shared_bytes, Config::SPLIT, seed,
                     [=] { sparse::decode_kernel<Config>(p); });
}

template <class Config>
int run_sm80_case(unsigned seed, dim3 grid, int shared_bytes, const Arguments& a) {
  using Scalar = typename Config::Scalar;
  const auto p = problem_of_rows<sparse::Sm80Problem<Scalar>, Scalar>(a);
  return emu::launch(grid, {Config::THREADS}, shared_bytes, 1, seed,
                     [=] { sparse::sm80_kernel<Config>(p); });
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* violation() {
  return emu::S.violation.c_str();
}

#define X(number, ...) \
  case number:         \
    return run_case<sparse::Config<__VA_ARGS__>>(seed, grid, shared_bytes, *a);
#define Y(number, ...) \
  case number:         \
    return run_sm80_case<sparse::Sm80Config<__VA_ARGS__>>(seed, grid, shared_bytes, *a);
#define Z(number, ...) \
  case number:         \
    return run_decode_case<sparse::DecodeConfig<__VA_ARGS__>>(seed, grid, shared_bytes, *a);
extern "C" __attribute__((visibility("default"))) int run(int config, unsigned seed, int grid_x,
                                                          int grid_y, int shared_bytes,
                                                          const Arguments* a) {
  const dim3 grid = {unsigned(grid_x), unsigned(grid_y), 1};
  switch (config) { CASES }
  return -1;
}
#undef X
#undef Y
#undef Z
