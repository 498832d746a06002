// What happens to activations before a product: gathering by an index (act-order with many tokens),
// and rounding to 8 bits with one scale per token.
#pragma once

#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/convert.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared_memory.cuh"

namespace sm80 {

constexpr int PREPARE_THREADS = 256;

// gathered[m][r] = a[m][permutation[r]], or 0 where the index is negative.
struct GatherProblem {
  const unsigned short* activations;  // [M, K], 16-bit elements of any kind
  const int* permutation;             // [K']
  uint4* gathered;                    // [M, K'], contiguous
  long long row_stride;               // elements between rows of A
  int m, k_padded;                    // K' is a multiple of 8
};

template <int Elements>  // of one 16-byte store
__global__ void __launch_bounds__(PREPARE_THREADS)
    gather_activations(const __grid_constant__ GatherProblem p) {
  static_assert(Elements == 8, "16-bit elements");
  const int row_chunks = p.k_padded / Elements;
  const long long chunks = static_cast<long long>(p.m) * row_chunks;
  const long long step = static_cast<long long>(gridDim.x) * PREPARE_THREADS;
  for (long long i = blockIdx.x * PREPARE_THREADS + threadIdx.x; i < chunks; i += step) {
    const long long token = i / row_chunks;
    const int4* columns = reinterpret_cast<const int4*>(p.permutation) + i % row_chunks * 2;
    const int4 low = columns[0], high = columns[1];
    const int column[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const unsigned short* row = p.activations + token * p.row_stride;
    uint32_t element[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) element[e] = column[e] >= 0 ? row[column[e]] : 0;
    p.gathered[i] = uint4{element[0] | element[1] << 16, element[2] | element[3] << 16,
                          element[4] | element[5] << 16, element[6] | element[7] << 16};
  }
}

// codes[m][...] = round(a[m] / scale[m]), scale[m] = max(|a[m]|) / largest. Every 16 codes lie in the
// order in which mma_8bit.cuh wants them (dequant/eight_bit.cuh); codes from K to K' are 0.
struct QuantizeProblem {
  const void* activations;  // [M, K]
  uint4* codes;             // [M, K'] bytes, contiguous
  float* scales;            // [M]
  long long row_stride;     // elements between rows of A
  int m, k, k_padded;       // K' is a multiple of 16
};

struct QuantizeStorage {
  float largest[PREPARE_THREADS / kWarpSize];
};

constexpr float kSmallestMaximum = 9.094947017729282e-13f;  // 2^-40: tokens of zeros have a scale too

// Values of 16 inputs from k on, 0 beyond K.
template <class Scalar>
__device__ __forceinline__ void load_16(const Scalar* row, int k, int count, bool aligned,
                                        float (&values)[16]) {
  if (aligned && k + 16 <= count) {
    const uint4* chunks = reinterpret_cast<const uint4*>(row + k);
    const uint4 pair[2] = {chunks[0], chunks[1]};
    const Scalar* elements = reinterpret_cast<const Scalar*>(pair);
#pragma unroll
    for (int e = 0; e < 16; ++e) values[e] = Element<Scalar>::to_float(elements[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 16; ++e)
      values[e] = k + e < count ? Element<Scalar>::to_float(row[k + e]) : 0.f;
  }
}

template <class Scalar, class Code>
__global__ void __launch_bounds__(PREPARE_THREADS)
    quantize_activations(const __grid_constant__ QuantizeProblem p) {
  constexpr float kLargest = kIsSame<Code, int8_t> ? 127.f : 448.f;
  constexpr int kOrder[4] = {0, 1, 8, 9};
  QuantizeStorage& shared = ptx::shared_memory<QuantizeStorage>();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  ptx::launch_dependents();  // a kernel that waits for these codes may fetch its weights meanwhile
#endif
  for (int token = blockIdx.x; token < p.m; token += gridDim.x) {
    const Scalar* row = static_cast<const Scalar*>(p.activations) + token * p.row_stride;
    const bool aligned = reinterpret_cast<unsigned long long>(row) % 16 == 0;
    float largest = kSmallestMaximum;
    for (int k = threadIdx.x * 16; k < p.k; k += PREPARE_THREADS * 16) {
      float values[16];
      load_16(row, k, p.k, aligned, values);
#pragma unroll
      for (int e = 0; e < 16; ++e) largest = fmaxf(largest, fabsf(values[e]));
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    if (threadIdx.x % kWarpSize == 0) shared.largest[threadIdx.x / kWarpSize] = largest;
    ptx::block_sync();
#pragma unroll
    for (int w = 0; w < PREPARE_THREADS / kWarpSize; ++w)
      largest = fmaxf(largest, shared.largest[w]);
    ptx::block_sync();  // all have read before the next token's are written
    const float scale = largest / kLargest;
    if (threadIdx.x == 0) p.scales[token] = scale;
    for (int k = threadIdx.x * 16; k < p.k_padded; k += PREPARE_THREADS * 16) {
      float values[16];
      load_16(row, k, p.k, aligned, values);
      uint32_t words[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = values[2 * t + kOrder[i]] / scale;
        words[t] = ptx::pack_bytes(four, Code());
      }
      p.codes[(static_cast<long long>(token) * p.k_padded + k) / 16] =
          uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

}  // namespace sm80
