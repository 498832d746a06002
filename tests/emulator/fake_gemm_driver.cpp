// A libcuda.so.1 for programs that embed the kernels (marlin_kernel.h): an imagined sm_80 GPU whose
// memory is the host's. A launch of the sm_80 kernel multiplies from the arguments that it was
// given, in plain loops, so that a program's packing, sizes and pointers are put to the test.
// The environment variable FAKE_GROUP holds the group size of the layer, 0 for one group.
#include <cuda.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#define MARLIN_KERNEL_IMPLEMENTATION
#include "marlin_kernel.h"

namespace {

std::string symbol;  // of the function asked for last

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

// Weight [k][n] of packed words, as FORMAT.md has it.
float weight(const marlin_sm80_problem& p, int bits, int group, int k, int n) {
  const std::uint16_t* order = bits == 4 ? marlin_tile_order_4 : marlin_tile_order_8;
  const int place = k % 16 * 64 + n % 64, per_word = 32 / bits;
  int at = 0;
  while (order[at] != place) ++at;
  const std::size_t tile = std::size_t(k / 16) * (p.n_padded / 64) + n / 64;
  const auto* words = static_cast<const std::uint32_t*>(p.weights);
  const std::uint32_t word = words[tile * (1024 / per_word) + at / per_word];
  const int code = word >> (bits * (at % per_word)) & ((1 << bits) - 1);
  int column = n;  // of the scale: natural with one group
  if (group > 0) {
    column = n / 64 * 64;
    while (column / 64 * 64 + marlin_scale_order_grouped[column % 64] != n) ++column;
  }
  const std::size_t row = group > 0 ? k / group : 0;
  const auto* scales = static_cast<const std::uint16_t*>(p.scales);
  return (code - (1 << (bits - 1))) * from_half(scales[row * p.n_padded + column]);
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
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 8;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 108;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 163 << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = 164 << 10;
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
  symbol = name;
  // which types: the mangled name of weights::uint8b128 or of weights::uint4b8
  const int bits = symbol.find("uint8b128") != std::string::npos ? 8 : 4;
  *function = reinterpret_cast<CUfunction>(std::uintptr_t(bits));
  return symbol.find("sm804gemm") != std::string::npos ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void**) {
  if (config->gridDimX == 0 || config->blockDimX % 32 != 0 || config->sharedMemBytes > 163 << 10)
    return CUDA_ERROR_INVALID_VALUE;
  const auto& p = *static_cast<const marlin_sm80_problem*>(arguments[0]);
  const int bits = int(reinterpret_cast<std::uintptr_t>(function));
  const int group = std::atoi(std::getenv("FAKE_GROUP"));
  const auto* a = static_cast<const std::uint16_t*>(p.activations);
  const auto* bias = static_cast<const std::uint16_t*>(p.bias);
  auto* out = static_cast<std::uint16_t*>(p.output);
  for (int n = 0; n < p.n; ++n) {
    double* sums = new double[p.m];
    for (int m = 0; m < p.m; ++m) sums[m] = bias != nullptr ? from_half(bias[n]) : 0;
    for (int k = 0; k < p.k; ++k) {
      const double w = weight(p, bits, group, k, n);
      for (int m = 0; m < p.m; ++m) sums[m] += w * from_half(a[m * p.row_stride + k]);
    }
    for (int m = 0; m < p.m; ++m) out[std::size_t(m) * p.n + n] = to_half(float(sums[m]));
    delete[] sums;
  }
  return CUDA_SUCCESS;
}

}  // extern "C"
