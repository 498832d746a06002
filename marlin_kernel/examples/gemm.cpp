// Multiplies 4-bit and 8-bit weights with 16-bit and 8-bit activations through the C header alone,
// and compares with a sum over the same numbers on the CPU. docs/embedding.md says how to build and
// run it:
//
//     gemm build/kernels/cubins [K N GROUP_SIZE]
//
// Exit status: 0 results agree, 1 they do not, 2 something is missing (the message says what).
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define MARLIN_KERNEL_IMPLEMENTATION
#include "marlin_kernel.h"

namespace {

[[noreturn]] void fail(const char* what, const char* why) {
  std::fprintf(stderr, "%s: %s\n", what, why);
  std::exit(2);
}

void check(marlin_status status, const char* what) {
  if (status != MARLIN_OK) fail(what, marlin_error());
}

// The driver calls of this example, found at run time, so that it links on machines without a
// driver.
struct Driver {
#define DRIVER_CALLS(X)                                                                       \
  X(cuInit)                                                                                   \
  X(cuDeviceGet)                                                                              \
  X(cuDevicePrimaryCtxRetain)                                                                 \
  X(cuCtxSetCurrent) X(cuMemAlloc) X(cuMemFree) X(cuMemcpyHtoD) X(cuMemcpyDtoH) X(cuMemsetD8) \
      X(cuCtxSynchronize)
#define DECLARE(name) decltype(&name) call_##name;
  DRIVER_CALLS(DECLARE)

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) fail("libcuda.so.1", dlerror());
#define STRING(x) #x
#define SYMBOL(x) STRING(x)
#define LOOK_UP(name)                                                     \
  *reinterpret_cast<void**>(&call_##name) = dlsym(library, SYMBOL(name)); \
  if (call_##name == nullptr) fail(SYMBOL(name), "not in this driver");
    DRIVER_CALLS(LOOK_UP)
  }
};

void check(CUresult code, const char* what) {
  if (code != CUDA_SUCCESS) fail(what, ("CUDA error " + std::to_string(code)).c_str());
}

// Device memory that holds a copy of host memory, or zeros.
class Buffer {
 public:
  Buffer(const Driver& driver, std::size_t bytes, const void* content = nullptr) : driver_(driver) {
    bytes = bytes > 0 ? bytes : 1;
    check(driver.call_cuMemAlloc(&address_, bytes), "cuMemAlloc");
    check(content != nullptr ? driver.call_cuMemcpyHtoD(address_, content, bytes)
                             : driver.call_cuMemsetD8(address_, 0, bytes),
          "copy to the device");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { driver_.call_cuMemFree(address_); }
  void* get() const { return reinterpret_cast<void*>(address_); }
  CUdeviceptr address() const { return address_; }

 private:
  const Driver& driver_;
  CUdeviceptr address_ = 0;
};

// float16 bits of a number that float16 holds exactly (normal, or zero), and back.
std::uint16_t to_half(float value) {
  if (value == 0) return 0;
  int exponent;
  const float fraction = std::frexp(std::fabs(value), &exponent);  // 0.5 <= fraction < 1
  const int mantissa = static_cast<int>(fraction * 2048) - 1024;
  return static_cast<std::uint16_t>((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | mantissa);
}

float from_half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                     : exponent == 31
                         ? (mantissa == 0 ? INFINITY : NAN)
                         : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

std::uint32_t random_number() {  // the same numbers on every machine
  static std::uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>(state >> 33);
}

// A layer with known weights, and what it becomes for the kernels of a device and activations.
struct Layer {
  marlin_layer shape;
  marlin_dtype activation;
  std::vector<float> weights;                                       // [k, n]
  std::vector<unsigned char> repacked_weights, repacked_scales;

  Layer(const marlin_device& device, const marlin_layer& shape, marlin_dtype activation)
      : shape(shape), activation(activation), weights(std::size_t(shape.k) * shape.n) {
    const auto [type, k, n, group_size] = shape;
    const int group = group_size < 0 ? k : group_size;
    const int groups = (k + group - 1) / group;
    std::vector<std::uint16_t> scales(std::size_t(groups) * n);
    for (auto& scale : scales) scale = to_half((1 + random_number() % 64) / 1024.f);
    // As a GPTQ checkpoint holds it: codes along k in a word, the middle code means zero.
    const int bits = marlin_weight_infos[type].bits, factor = 32 / bits;
    std::vector<std::uint32_t> qweight(std::size_t((k + factor - 1) / factor) * n);
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < n; ++j) {
        const std::uint32_t code = random_number() % (1 << bits);
        qweight[std::size_t(i / factor) * n + j] |= code << (bits * (i % factor));
        weights[std::size_t(i) * n + j] = (static_cast<int>(code) - (1 << (bits - 1))) *
                                          from_half(scales[std::size_t(i / group) * n + j]);
      }
    marlin_sizes sizes;
    check(marlin_layer_sizes(&shape, &sizes), "marlin_layer_sizes");
    std::vector<std::uint32_t> b(sizes.weight_bytes / 4);
    std::vector<std::uint16_t> s(sizes.scale_bytes / 2);
    check(marlin_pack_gptq(&shape, qweight.data(), scales.data(), nullptr, b.data(), s.data(),
                           nullptr),
          "marlin_pack_gptq");
    marlin_repacked_sizes repacked;
    check(marlin_repack_sizes(&device, &shape, activation, &repacked), "marlin_repack_sizes");
    repacked_weights.resize(repacked.weight_bytes);
    repacked_scales.resize(repacked.scale_bytes);
    check(marlin_repack(&device, &shape, activation, b.data(), s.data(), nullptr,
                        repacked_weights.data(), repacked_scales.data(), nullptr),
          "marlin_repack");
  }
};

// ||out - reference|| / ||reference||
double relative_error(const std::vector<std::uint16_t>& out, const std::vector<std::uint16_t>& a,
                      const std::vector<std::uint16_t>& bias, const Layer& layer, int m) {
  const int k = layer.shape.k, n = layer.shape.n;
  double difference = 0, total = 0;
  std::vector<double> row(n);
  for (int token = 0; token < m; ++token) {
    for (int j = 0; j < n; ++j) row[j] = from_half(bias[j]);
    for (int i = 0; i < k; ++i) {
      const double x = from_half(a[std::size_t(token) * k + i]);
      for (int j = 0; j < n; ++j) row[j] += x * layer.weights[std::size_t(i) * n + j];
    }
    for (int j = 0; j < n; ++j) {
      const double d = from_half(out[std::size_t(token) * n + j]) - row[j];
      difference += d * d;
      total += row[j] * row[j];
    }
  }
  return std::sqrt(difference / total);
}

marlin_problem problem_of(const marlin_layer& layer, marlin_dtype activation, int m,
                          bool batch_invariant) {
  marlin_problem problem = {};
  problem.layer = layer;
  problem.activation = activation;
  problem.output = MARLIN_FLOAT16;
  problem.m = m;
  problem.batch_invariant = batch_invariant;
  return problem;
}

double multiply(const Driver& driver, marlin_runtime* runtime, const Layer& layer, int m,
                bool batch_invariant) {
  const int k = layer.shape.k, n = layer.shape.n;
  std::vector<std::uint16_t> a(std::size_t(m) * k), bias(n), out(std::size_t(m) * n);
  // Multiples of 1/128, the largest of a token 127/128: rounding them to int8 changes nothing.
  for (auto& x : a) x = to_half((static_cast<int>(random_number() % 255) - 127) / 128.f);
  for (int token = 0; token < m; ++token) a[std::size_t(token) * k] = to_half(127 / 128.f);
  for (auto& x : bias) x = to_half((static_cast<int>(random_number() % 33) - 16) / 4.f);

  const marlin_problem problem = problem_of(layer.shape, layer.activation, m, batch_invariant);
  marlin_plan plan;
  check(marlin_plan_gemm(runtime, &problem, &plan), "marlin_plan_gemm");
  const Buffer weights(driver, layer.repacked_weights.size(), layer.repacked_weights.data());
  const Buffer scales(driver, layer.repacked_scales.size(), layer.repacked_scales.data());
  const Buffer activations(driver, a.size() * 2, a.data()),
      biases(driver, bias.size() * 2, bias.data());
  const Buffer results(driver, out.size() * 2), counters(driver, plan.counter_bytes);
  const Buffer partials(driver, plan.partial_bytes);
  const Buffer codes(driver, std::size_t(m) * plan.k_padded), token_scales(driver, m * 4);
  marlin_operands operands = {};
  operands.a = activations.get();
  operands.row_stride = k;
  operands.weights = weights.get();
  operands.scales = scales.get();
  operands.bias = biases.get();
  operands.out = results.get();
  operands.counters = counters.get();
  operands.partials = partials.get();
  if (layer.activation == MARLIN_INT8) {
    operands.a = codes.get();
    operands.row_stride = plan.k_padded;
    operands.token_scales = static_cast<const float*>(token_scales.get());
  }
  for (int repeat = 0; repeat < 3; ++repeat) {  // counters are zero again after each
    if (layer.activation == MARLIN_INT8)
      check(marlin_quantize(runtime, &plan, activations.get(), k, codes.get(),
                            static_cast<float*>(token_scales.get()), nullptr),
            "marlin_quantize");
    check(marlin_gemm(runtime, &plan, &operands, nullptr), "marlin_gemm");
  }
  check(driver.call_cuCtxSynchronize(), "cuCtxSynchronize");
  check(driver.call_cuMemcpyDtoH(out.data(), results.address(), out.size() * 2), "cuMemcpyDtoH");
  const double error = relative_error(out, a, bias, layer, m);
  std::printf(
      "%s x %s m=%4d k=%d n=%d group_size=%d batch_invariant=%d: kernel %d, %ux%u blocks of %u "
      "threads, relative error %.5f\n",
      marlin_weight_infos[layer.shape.type].name,
      layer.activation == MARLIN_INT8 ? "int8" : "float16", m, k, n, layer.shape.group_size, batch_invariant,
      plan.kernel, plan.grid_x, plan.grid_y, plan.threads, error);
  return error;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2 && count != 5) fail("usage", "gemm CUBINS [K N GROUP_SIZE]");
  const Driver driver;
  CUdevice device;
  CUcontext context;
  check(driver.call_cuInit(0), "cuInit");
  check(driver.call_cuDeviceGet(&device, 0), "cuDeviceGet");
  check(driver.call_cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  check(driver.call_cuCtxSetCurrent(context), "cuCtxSetCurrent");
  marlin_runtime* runtime;
  check(marlin_open(arguments[1], &runtime), "marlin_open");

  const int k = count == 5 ? std::atoi(arguments[2]) : 1024;
  const int n = count == 5 ? std::atoi(arguments[3]) : 768;
  const int group_size = count == 5 ? std::atoi(arguments[4]) : 128;
  const marlin_device& gpu = *marlin_get_device(runtime);
  int compared = 0;
  bool good = true;
  const struct {
    marlin_weight_type type;
    marlin_dtype activation;
  } cases[] = {{MARLIN_WEIGHT_UINT4B8, MARLIN_FLOAT16},
               {MARLIN_WEIGHT_UINT8B128, MARLIN_FLOAT16},
               {MARLIN_WEIGHT_UINT4B8, MARLIN_INT8}};
  for (const auto [type, activation] : cases) {
    const marlin_layer shape = {type, k, n, group_size};
    const marlin_problem probe = problem_of(shape, activation, 1, false);
    marlin_plan plan;
    if (marlin_choose(&gpu, &probe, &plan) == MARLIN_NO_KERNEL) {
      std::printf("left out: %s\n", marlin_error());
      continue;
    }
    const Layer layer(gpu, shape, activation);
    for (const int m : {1, 2, 7, 16, 33, 64, 100, 300})
      for (const bool batch_invariant : {false, true}) {
        const double error = multiply(driver, runtime, layer, m, batch_invariant);
        good = good && error < 1e-3;  // float16 outputs round by up to 0.0005
        ++compared;
      }
  }
  marlin_close(runtime);
  if (compared == 0) fail("nothing to compare", "generate kernels of uint4b8 with float16");
  std::printf("%s\n", good ? "all results agree" : "RESULTS DIFFER");
  return good ? 0 : 1;
}
