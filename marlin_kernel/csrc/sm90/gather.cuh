// Act-order in front of a product: activations in the order of the weights' rows.
//
// Rows of activations come into shared memory by bulk copies, threads pick their elements there and
// store 16 bytes at a time. A block works on one part of K' and on every gridDim.y-th token. The
// index is constant, so a block reads its part before the preceding kernel has ended; and since all
// blocks let the next kernel start at once, that one fetches its weights meanwhile.
//
// Of few tokens, threads load their elements straight from device memory (pick_kernel): a sector of
// 32 bytes each, but one latency instead of that of a copy, a barrier and a read behind each other.
#pragma once

#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared_memory.cuh"

namespace sm90 {

// gathered[m][r] = activations[m][permutation[r]], or 0 where the index is negative.
struct GatherProblem {
  const uint16_t* activations;  // [m, k], 16-bit elements of any kind
  const int* permutation;       // [k_padded], on 16 bytes
  uint4* gathered;              // [m, k_padded], contiguous
  long long row_stride;         // elements between rows of activations
  int m, k, k_padded;           // k_padded is a multiple of 64, k < 65536
  int part;                     // of K', of a block: a multiple of 8
};

template <int THREADS_,   // of a block
          int ROWS_,      // of activations under way or being read
          int CLUSTER_>   // blocks that share a token, and fetch its row together
struct GatherConfig {
  static constexpr int THREADS = THREADS_;
  static constexpr int ROWS = ROWS_;
  static constexpr int CLUSTER = CLUSTER_;
  static_assert(CLUSTER == 1 || ROWS == 1, "such blocks take one token");
  static constexpr int CHUNK = 8;  // elements of one store
  // Threads of a multiprocessor that registers must leave room for. Blocks of one row stay small, so
  // that they find room beside the preceding product.
  static constexpr int RESIDENT = ROWS == 1 ? 2048 : 1024;
};

// Dynamic shared memory; the rows [ROWS][k + 8] and the index [part], 2 bytes each, follow it.
template <class Config>
struct GatherStorage {
  alignas(16) uint64_t full[Config::ROWS];
};

template <class Config>
class Gatherer {
  using Storage = GatherStorage<Config>;

 public:
  __device__ __forceinline__ explicit Gatherer(const GatherProblem& p)
      : p_(p),
        shared_(ptx::shared_memory<Storage>()),
        row_elements_((p.k + 7) / 8 * 8 + 8),
        rows_(reinterpret_cast<uint16_t*>(&shared_ + 1)),
        index_(reinterpret_cast<uint4*>(rows_ + Config::ROWS * row_elements_)),
        first_(static_cast<int>(blockIdx.x) * p.part),
        chunks_(min(p.part, p.k_padded - first_) / Config::CHUNK),
        aligned_((reinterpret_cast<unsigned long long>(p.activations) |
                  (p.m > 1 ? p.row_stride * sizeof(uint16_t) : 0) | p.k * sizeof(uint16_t)) %
                     16 ==
                 0) {}

  __device__ __forceinline__ void run() {
    ptx::launch_dependents();
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < Config::ROWS; ++i) ptx::mbarrier_init(&shared_.full[i], 1);
      ptx::fence_mbarrier_init();
    }
    if (threadIdx.x < Config::ROWS) row(threadIdx.x)[p_.k] = 0;
    if (Config::CLUSTER > 1) ptx::cluster_arrive();
    read_index();
    if (Config::CLUSTER > 1)
      ptx::cluster_wait();  // all have barriers
    else
      ptx::block_sync();
    ptx::wait_for_predecessors();
    const int step = static_cast<int>(gridDim.y);
    const int begin = static_cast<int>(blockIdx.y);
    if (aligned_ && threadIdx.x == 0)
      for (int i = 0; i < Config::ROWS; ++i) fetch(begin + i * step, i);
    int place = 0;
    uint32_t parity = 0;
    for (int token = begin; token < p_.m; token += step) {
      if (aligned_) {
        ptx::mbarrier_wait(&shared_.full[place], parity);
      } else {
        for (int i = threadIdx.x; i < p_.k; i += Config::THREADS)
          row(place)[i] = p_.activations[token * p_.row_stride + i];
        ptx::block_sync();
      }
      gather(token, row(place));
      ptx::block_sync();  // all have read the row
      if (aligned_ && threadIdx.x == 0) fetch(token + Config::ROWS * step, place);
      if (++place == Config::ROWS) {
        place = 0;
        parity ^= 1;
      }
    }
  }

 private:
  __device__ __forceinline__ uint16_t* row(int place) const {
    return rows_ + place * row_elements_;
  }

  // This thread's part of the index, as 16-bit numbers; no input is the zero after the row.
  __device__ __forceinline__ void read_index() {
    const int4* permutation = reinterpret_cast<const int4*>(p_.permutation + first_);
#pragma unroll 2
    for (int chunk = threadIdx.x; chunk < chunks_; chunk += Config::THREADS) {
      const int4 low = permutation[2 * chunk], high = permutation[2 * chunk + 1];
      index_[chunk] = uint4{pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y),
                            pair(high.z, high.w)};
    }
  }

  __device__ __forceinline__ uint32_t pair(int first, int second) const {
    const uint32_t low = first < 0 ? p_.k : first, high = second < 0 ? p_.k : second;
    return low | high << 16;
  }

  __device__ __forceinline__ void fetch(int token, int place) {
    if (token >= p_.m) return;
    const int bytes = p_.k * static_cast<int>(sizeof(uint16_t));
    const uint16_t* from = p_.activations + token * p_.row_stride;
    ptx::mbarrier_arrive_expect(&shared_.full[place], bytes);
    if (Config::CLUSTER == 1) {
      ptx::bulk_copy(row(place), from, bytes, &shared_.full[place]);
      return;
    }
    const int share = (p_.k + Config::CLUSTER * 8 - 1) / (Config::CLUSTER * 8) * 8;
    const int first = static_cast<int>(ptx::cluster_rank()) * share;
    const int elements = min(share, p_.k - first);
    if (elements > 0)
      ptx::bulk_copy_to_cluster(row(place) + first, from + first, elements * 2,
                                &shared_.full[place], (1 << Config::CLUSTER) - 1);
  }

  __device__ __forceinline__ void gather(int token, const uint16_t* from) {
    uint4* target =
        p_.gathered + (static_cast<long long>(token) * p_.k_padded + first_) / Config::CHUNK;
#pragma unroll 2
    for (int chunk = threadIdx.x; chunk < chunks_; chunk += Config::THREADS) {
      const uint4 columns = index_[chunk];
      target[chunk] = uint4{picked(from, columns.x), picked(from, columns.y),
                            picked(from, columns.z), picked(from, columns.w)};
    }
  }

  static __device__ __forceinline__ uint32_t picked(const uint16_t* from, uint32_t columns) {
    const uint32_t low = from[columns & 0xffff], high = from[columns >> 16];
    return low | high << 16;
  }

  const GatherProblem& p_;
  Storage& shared_;
  const int row_elements_;  // in shared memory
  uint16_t* const rows_;
  uint4* const index_;
  const int first_;   // of this block's part of K'
  const int chunks_;  // in it
  const bool aligned_;
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::RESIDENT / Config::THREADS)
    gather_kernel(const __grid_constant__ GatherProblem problem) {
  Gatherer<Config>(problem).run();
}

// A thread picks four elements of every gridDim.y-th token; a part has 4 THREADS elements.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    pick_kernel(const __grid_constant__ GatherProblem problem) {
  const GatherProblem& p = problem;
  ptx::launch_dependents();
  const int quad = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  if (4 * quad >= p.k_padded) return;
  const int4 columns = reinterpret_cast<const int4*>(p.permutation)[quad];
  ptx::wait_for_predecessors();
  for (int token = blockIdx.y; token < p.m; token += gridDim.y) {
    const uint16_t* row = p.activations + token * p.row_stride;
    const uint32_t first = columns.x < 0 ? 0 : row[columns.x];
    const uint32_t second = columns.y < 0 ? 0 : row[columns.y];
    const uint32_t third = columns.z < 0 ? 0 : row[columns.z];
    const uint32_t fourth = columns.w < 0 ? 0 : row[columns.w];
    reinterpret_cast<uint2*>(p.gathered)[token * (p.k_padded / 4LL) + quad] =
        uint2{first | second << 16, third | fourth << 16};
  }
}

}  // namespace sm90
