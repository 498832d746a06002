// A libcuda.so.1 for programs that embed the kernels (marlin_kernel.h): an imagined GPU whose
// memory is the host's. A launch multiplies from the arguments that the kernel was given, in plain
// loops, so that a program's packing, sizes and pointers are put to the test. Environment:
//     FAKE_CAPABILITY   "80" or "90"
//     FAKE_GROUP        group size of the layer, 0 for one group
// Weights: uint4b8 and uint8b128.
#include <cuda.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define MARLIN_KERNEL_IMPLEMENTATION
#include "marlin_kernel.h"

namespace {

float from_half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 0 ? std::ldexp(float(mantissa), -24)
                                   : std::ldexp(float(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

std::uint16_t to_half(float value) {  // rounds to nearest; neither tiny nor huge numbers
  int exponent;
  const float fraction = std::frexp(std::fabs(value), &exponent);
  if (value == 0 || exponent < -13) return 0;
  const int mantissa = int(std::nearbyint(fraction * 2048)) - 1024;  // 1024 carries
  return std::uint16_t((value < 0 ? 0x8000 : 0) | (((exponent + 14) << 10) + mantissa));
}

int group_size() { return std::atoi(std::getenv("FAKE_GROUP")); }
bool hopper() { return std::strcmp(std::getenv("FAKE_CAPABILITY"), "90") == 0; }

// Where code [k][n] lies in its packed 16 x 64 tile (FORMAT.md), counted in codes.
int place_in_tile(int bits, int k, int n) {
  static int places[2][1024];
  static const bool filled = [] {
    for (int i = 0; i < 1024; ++i) {
      places[0][marlin_tile_order_4[i]] = i;
      places[1][marlin_tile_order_8[i]] = i;
    }
    return true;
  }();
  return filled ? places[bits == 8][k % 16 * 64 + n % 64] : -1;
}

float value(std::uint32_t word, int bits, int number, std::uint16_t scale) {
  const int code = word >> (bits * number) & ((1 << bits) - 1);
  return (code - (1 << (bits - 1))) * from_half(scale);
}

// Weight [k][n] as the sm_80 kernels find it.
float weight(const marlin_sm80_problem& p, int bits, int k, int n) {
  const int at = place_in_tile(bits, k, n), per_word = 32 / bits, group = group_size();
  const std::size_t tile = std::size_t(k / 16) * (p.n_padded / 64) + n / 64;
  const auto* words = static_cast<const std::uint32_t*>(p.weights);
  int column = n;  // of the scale: natural with one group
  if (group > 0) {
    column = n / 64 * 64;
    while (column / 64 * 64 + marlin_scale_order_grouped[column % 64] != n) ++column;
  }
  const std::size_t row = group > 0 ? k / group : 0;
  const auto* scales = static_cast<const std::uint16_t*>(p.scales);
  return value(words[tile * (1024 / per_word) + at / per_word], bits, at % per_word,
               scales[row * p.n_padded + column]);
}

// Weight [k][n] as the sm_90 kernels find it (csrc/sm90/problem.cuh).
float weight(const marlin_sm90_problem& p, int bits, int k, int n) {
  const int per_word = 32 / bits, halves = bits / 4, group = group_size();
  const int at = place_in_tile(bits, k, n), word = at / per_word;
  const int lane = word / (4 * halves), m = word / halves % 4, h = word % halves;
  const int column = n / 64, first = column / 2 * 2, f = n % 64, kk = k / 16 % 4;
  const int width = p.column_tiles - first < 2 ? 1 : 2;
  const std::size_t tile =
      std::size_t(first) * p.k_tiles + std::size_t(k / 64) * width + (column - first);
  const int in_tile = bits == 4 ? (m * 32 + lane) * 4 + kk
                                : (((m * 2 + kk / 2) * 32 + lane) * 2 + kk % 2) * 2 + h;
  const int groups = group > 0 ? (p.k_tiles * 64 + group - 1) / group : 1;
  const int of_tile = group > 0 && group < 64 ? 64 / group : 1;  // groups
  const int g = group > 0 ? k / group : 0;
  const std::size_t row = std::size_t(first) * groups + std::size_t(g / of_tile) * width * of_tile +
                          (column - first) * of_tile + g % of_tile;
  const auto* words = static_cast<const std::uint32_t*>(p.weights);
  const auto* scales = static_cast<const std::uint16_t*>(p.scales);
  return value(words[tile * 512 * halves + in_tile], bits, at % per_word,
               scales[row * 64 + f % 8 * 8 + f / 16 * 2 + f / 8 % 2]);
}

// Weight [k][n] of uint4b8 as the kernels for int8 find it (csrc/sm90_8bit/config.cuh); k counts
// places of the activations.
float weight(const marlin_sm90_8bit_problem& p, int, int k, int n) {
  const int group = group_size(), rows = group > 0 ? 128 / group : 0, record = 4096 + rows * 128;
  const int stage = k / 128, in = k % 128, m = n % 64 / 16, h = n / 8 % 2, g = n % 8;
  const auto* bytes = static_cast<const std::uint8_t*>(p.weights) +
                      (std::size_t(n / 64) * p.k_tiles + stage) * record;
  const int at = (((in / 64 * 4 + m) * 32 + g * 4 + in % 16 / 4) * 4 + in / 16 % 4) * 4 + in % 4;
  const int code = bytes[at] >> (4 * h) & 15;  // minus 8, in two's complement
  const auto* scales = static_cast<const float*>(p.scale_b);
  float scale = 16 * scales[n * p.scale_b_stride];
  if (group > 0) {
    std::uint16_t half;
    std::memcpy(&half, bytes + 4096 + in / group * 128 + 2 * ((m * 8 + g) * 2 + h), 2);
    scale *= from_half(half);
  }
  return (code - (code & 8) * 2) * scale;
}

std::uint16_t* output(const marlin_sm80_problem& p) {
  return static_cast<std::uint16_t*>(p.output);
}
std::uint16_t* output(const marlin_sm90_problem& p) { return static_cast<std::uint16_t*>(p.out); }

std::uint16_t* output(const marlin_sm90_8bit_problem& p) {
  return static_cast<std::uint16_t*>(p.out);
}

// What an encoded tensor map stands for.
struct Map {
  void* address;
  cuuint64_t k, m, row_bytes;
  cuuint32_t box_k, box_m;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a map holds it");

// out = activation(m, k) W + bias; k: as the kernel counts it.
template <class Problem, class Activation>
CUresult multiply(const Problem& p, int k_end, int bits, Activation activation) {
  const auto* bias = static_cast<const std::uint16_t*>(p.bias);
  for (int n = 0; n < p.n; ++n) {
    std::vector<double> sums(p.m, bias != nullptr ? from_half(bias[n]) : 0);
    for (int k = 0; k < k_end; ++k) {
      const double w = weight(p, bits, k, n);
      for (int m = 0; m < p.m; ++m) sums[m] += w * activation(m, k);
    }
    for (int m = 0; m < p.m; ++m) output(p)[std::size_t(m) * p.n + n] = to_half(float(sums[m]));
  }
  return CUDA_SUCCESS;
}

// The input at a place of the activations that quantize() leaves, and its inverse.
int input_at(int place) { return place / 16 * 16 + marlin_k_order[place % 16]; }
int place_of(int k) {
  int place = k / 16 * 16;
  while (input_at(place) != k) ++place;
  return place;
}

template <class Problem>
CUresult multiply(const Problem& p, int bits) {
  const auto* a = static_cast<const std::uint16_t*>(p.activations);
  return multiply(p, p.k, bits, [&](int m, int k) { return from_half(a[m * p.row_stride + k]); });
}

CUresult multiply(const marlin_sm80_problem& p, int bits) {
  if (p.token_scales == nullptr) return multiply<marlin_sm80_problem>(p, bits);
  const auto* codes = static_cast<const std::int8_t*>(p.activations);
  const auto* scales = static_cast<const float*>(p.token_scales);
  return multiply(p, p.k, bits, [&](int m, int k) {
    return scales[m] * codes[m * p.row_stride + place_of(k)];
  });
}

CUresult multiply(const marlin_sm90_8bit_problem& p, const Map& codes) {
  const auto* scales = static_cast<const float*>(p.scale_a);
  return multiply(p, int(codes.k), 4, [&](int m, int place) {
    return scales[m] * static_cast<const std::int8_t*>(codes.address)[m * codes.row_bytes + place];
  });
}

CUresult quantize(const marlin_quantize_problem& p) {
  const auto* a = static_cast<const std::uint16_t*>(p.activations);
  for (int m = 0; m < p.m; ++m) {
    float largest = 0;
    for (int k = 0; k < p.k; ++k)
      largest = std::fmax(largest, std::fabs(from_half(a[m * p.row_stride + k])));
    const float scale = static_cast<float*>(p.scales)[m] = largest / 127;
    for (int place = 0; place < p.k_padded; ++place) {
      const int k = input_at(place);
      const float x = k < p.k ? from_half(a[m * p.row_stride + k]) / scale : 0;
      static_cast<std::int8_t*>(p.codes)[std::size_t(m) * p.k_padded + place] =
          std::int8_t(std::nearbyint(x));
    }
  }
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  return *context = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) {
  return *text = "made up by the fake driver", CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const int shared = hopper() ? 227 << 10 : 163 << 10;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = hopper() ? 9 : 8;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = hopper() ? 132 : 108;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = shared;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = shared + 1024;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* address, std::size_t bytes) {
  void* memory = std::malloc(bytes);
  std::memset(memory, 0xff, bytes);  // NaN
  return *address = reinterpret_cast<CUdeviceptr>(memory), CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
  return std::free(reinterpret_cast<void*>(address)), CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, std::size_t bytes) {
  return std::memcpy(reinterpret_cast<void*>(to), from, bytes), CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, std::size_t bytes) {
  return std::memcpy(to, reinterpret_cast<void*>(from), bytes), CUDA_SUCCESS;
}
CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, std::size_t bytes) {
  return std::memset(reinterpret_cast<void*>(to), value, bytes), CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = reinterpret_cast<CUmodule>(1);
  return std::memcmp(image, "\177ELF", 4) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(strdup(name));  // a function is its name
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  const bool bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (!(bytes || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) || box[0] != (bytes ? 128 : 64) ||
      rank != 2 || strides[0] % 16 != 0 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[1] > 256)
    return CUDA_ERROR_INVALID_VALUE;
  const Map content = {address, sizes[0], sizes[1], strides[0], box[0], box[1]};
  std::memcpy(map, &content, sizeof(content));
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig* config) {
  return *clusters = config->numAttrs == 2 ? 30 : 0, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void**) {
  const std::string name = reinterpret_cast<const char*>(function);
  if (config->gridDimX == 0 || config->blockDimX % 32 != 0 ||
      config->sharedMemBytes > (hopper() ? 227 << 10 : 163 << 10))
    return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION &&
        config->gridDimX % config->attrs[i].value.clusterDim.x != 0)
      return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  const int bits = name.find("uint8b128") != std::string::npos ? 8 : 4;
  if (name.find("quantize_activations") != std::string::npos)
    return quantize(*static_cast<const marlin_quantize_problem*>(arguments[0]));
  if (name.find("sm804gemm") != std::string::npos)
    return multiply(*static_cast<const marlin_sm80_problem*>(arguments[0]), bits);
  Map map = {};
  if (name.find("gemm_kernel") != std::string::npos) std::memcpy(&map, arguments[1], sizeof(map));
  if (name.find("sm90_8bit") != std::string::npos) {
    const auto& p = *static_cast<const marlin_sm90_8bit_problem*>(arguments[0]);
    return map.m == cuuint64_t(p.m) && p.scale_a_stride == 1 ? multiply(p, map)
                                                             : CUDA_ERROR_INVALID_VALUE;
  }
  const auto& p = *static_cast<const marlin_sm90_problem*>(arguments[0]);
  if (map.address != nullptr &&
      (map.address != p.activations || map.k != cuuint64_t(p.k) || map.m != cuuint64_t(p.m) ||
       map.row_bytes != 2 * cuuint64_t(p.row_stride)))
    return CUDA_ERROR_INVALID_VALUE;
  return multiply(p, bits);
}

}  // extern "C"
