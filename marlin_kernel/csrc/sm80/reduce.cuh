// Sums of partial tiles, always in the same order: between the warps of a block that split k, and
// between the blocks that share an output tile. No thread ever waits for another block: every
// contributor leaves its partial sums in the workspace and counts its arrival; the last one to
// arrive adds them all up.
#pragma once

#include "ptx/barrier.cuh"
#include "sm80/mainloop.cuh"
#include "sm80/partition.cuh"
#include "sm80/shared_storage.cuh"
#include "sm80/tile_config.cuh"

namespace sm80 {

__device__ __forceinline__ void add(float (&sum)[4], const float4& v) {
  sum[0] += v.x;
  sum[1] += v.y;
  sum[2] += v.z;
  sum[3] += v.w;
}

// A fragment of sums on its way between blocks: four fp32 or four fp16.
template <bool HALF>
struct Exchanged {
  using Bits = float4;
  static __device__ __forceinline__ Bits pack(const float (&v)[4]) {
    return float4{v[0], v[1], v[2], v[3]};
  }
  static __device__ __forceinline__ float4 unpack(const Bits& v) { return v; }
};

template <>
struct Exchanged<true> {
  using Bits = uint2;
  static __device__ __forceinline__ Bits pack(const float (&v)[4]) {
    return uint2{pair(v[0], v[1]), pair(v[2], v[3])};
  }
  static __device__ __forceinline__ float4 unpack(const Bits& v) {
    const __half2 low = *reinterpret_cast<const __half2*>(&v.x);
    const __half2 high = *reinterpret_cast<const __half2*>(&v.y);
    const float2 a = __half22float2(low), b = __half22float2(high);
    return float4{a.x, a.y, b.x, b.y};
  }

 private:
  static __device__ __forceinline__ uint32_t pair(float x, float y) {
    const __half2 h(Element<__half>::from_float(x), Element<__half>::from_float(y));
    return *reinterpret_cast<const uint32_t*>(&h);
  }
};

// Fragment `index` (row tile major) of the accumulators.
template <class Config>
__device__ __forceinline__ float (&fragment(Accumulators<Config>& acc, int index))[4] {
  return acc.values[index / Config::TOKEN_TILES][index % Config::TOKEN_TILES];
}

// Warps with warp_k > 0 hand their sums to warp_k = 0, which adds them in the order of warp_k. One
// barrier: the region is written again only after the next unit's copies, which begin with a
// barrier of their own.
template <class Config>
__device__ __forceinline__ void reduce_in_block(SharedStorage<Config>& shared,
                                                const WarpPlace<Config>& place,
                                                Accumulators<Config>& acc) {
  if constexpr (Config::WARPS_K == 1) return;
  float4* region = shared.reduction + place.lane;
  if (place.warp_k > 0) {
    const int first =
        ((place.warp_k - 1) * Config::OUTPUT_WARPS + place.output_warp()) * Config::FRAGMENTS;
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS; ++i) {
      const float(&v)[4] = fragment(acc, i);
      region[(first + i) * WARP] = float4{v[0], v[1], v[2], v[3]};
    }
  }
  ptx::block_sync();
  if (place.warp_k > 0) return;
#pragma unroll
  for (int w = 1; w < Config::WARPS_K; ++w) {
    const int first = ((w - 1) * Config::OUTPUT_WARPS + place.output_warp()) * Config::FRAGMENTS;
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS; ++i) add(fragment(acc, i), region[(first + i) * WARP]);
  }
}

// Combines this warp's sums with those of the other contributions to the tile. True if the
// accumulators now hold the whole sum, which this warp must write out.
template <class Config>
class BlockReduction {
  using Exchange = Exchanged<Config::REDUCE_HALF>;
  using Bits = typename Exchange::Bits;
  static constexpr int LOADS = Config::WARP_M < 64 ? 16 : 4;  // of one fragment, under way at once

 public:
  __device__ BlockReduction(const Problem<Config>& p, const Partition& partition,
                            const WarpPlace<Config>& place)
      : p_(p), partition_(partition), place_(place) {}

  __device__ __forceinline__ bool complete(const Unit& u, Accumulators<Config>& acc) {
    if (u.parts == 1) return true;
    return u.in_turn ? complete_in_turn(u, acc) : complete_if_last(u, acc);
  }

 private:
  // First fragment of this thread in a slot.
  __device__ __forceinline__ Bits* slot(const Unit& u, int part) const {
    const long long number = partition_.slot(u, part, blockIdx.x);
    return static_cast<Bits*>(p_.partials) +
           (number * Config::OUTPUT_WARPS + place_.output_warp()) * Config::FRAGMENTS * WARP +
           place_.lane;
  }

  __device__ __forceinline__ void store(Bits* to, Accumulators<Config>& acc) {
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS; ++i) {
      const float(&v)[4] = fragment(acc, i);
      ptx::store_l2(to + i * WARP, Exchange::pack(v));
    }
  }

  // Adds COUNT consecutive parts, in order. Their loads are under way at once, as many as registers
  // allow: one after the other, the latencies would add up to more than a small multiplication
  // takes.
  template <int COUNT>
  __device__ __forceinline__ void add_parts(const Unit& u, int part, Accumulators<Config>& acc) {
    constexpr int AT_ONCE = Config::FRAGMENTS < LOADS / COUNT ? Config::FRAGMENTS : LOADS / COUNT;
#pragma unroll
    for (int first = 0; first < Config::FRAGMENTS; first += AT_ONCE) {
      Bits v[COUNT][AT_ONCE];
#pragma unroll
      for (int p = 0; p < COUNT; ++p) {
        const Bits* from = slot(u, part + p) + first * WARP;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) v[p][i] = ptx::load_l2(from + i * WARP);
      }
#pragma unroll
      for (int p = 0; p < COUNT; ++p)
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) add(fragment(acc, first + i), Exchange::unpack(v[p][i]));
    }
  }

  __device__ __forceinline__ void add_all(const Unit& u, Accumulators<Config>& acc) {
    constexpr int COUNT = Config::FRAGMENTS < LOADS ? LOADS / Config::FRAGMENTS : 1;
    int part = 0;
    for (; part + COUNT <= u.parts; part += COUNT) add_parts<COUNT>(u, part, acc);
    for (; part < u.parts; ++part) add_parts<1>(u, part, acc);
  }

  // All parts come to this very thread one after the other: the slot carries the sum so far.
  __device__ __forceinline__ bool complete_in_turn(const Unit& u, Accumulators<Config>& acc) {
    Bits* carry = slot(u, 0);
    if (u.part > 0) add_parts<1>(u, 0, acc);
    if (u.part == u.parts - 1) return true;
    store(carry, acc);
    return false;
  }

  __device__ __forceinline__ bool complete_if_last(const Unit& u, Accumulators<Config>& acc) {
    store(slot(u, u.part), acc);
    ptx::device_fence();
    ptx::warp_sync();
    int* counter = p_.arrivals + u.counter * Config::OUTPUT_WARPS + place_.output_warp();
    int arrived = 0;
    if (place_.lane == 0) arrived = ptx::atomic_add(counter, 1);
    arrived = ptx::shuffle(arrived, 0);
    if (arrived != u.parts - 1) return false;
    ptx::device_fence();
    acc.clear();
    add_all(u, acc);
    if (place_.lane == 0) *counter = 0;
    return true;
  }

  const Problem<Config>& p_;
  const Partition& partition_;
  const WarpPlace<Config>& place_;
};

}  // namespace sm80
