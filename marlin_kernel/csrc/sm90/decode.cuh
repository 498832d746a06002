// Small batches of dense weights; sm90/small_batch.cuh says how.
//
// Groups are scaled in the accumulator: sums of (code - zero) * activation are exact products in
// fp32, one fused multiply-add per accumulator and group replaces a multiplication per weight, and
// the scale never rounds.
//
// Act-order (GATHERS): weight rows are sorted by group, activations are not. A block loads whole
// rows of activations, and each lane picks its operands from them by an index, which is prepared
// before the preceding kernel has ended, while weights are on their way.
#pragma once

#include "dequant/int4_biased.cuh"
#include "dequant/operand.cuh"
#include "ptx/bit_ops.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/mma_add.cuh"
#include "sm90/decode_config.cuh"
#include "sm90/small_batch.cuh"

namespace sm90 {

template <class Config>
class Decoder : public SmallBatch<Config, Decoder<Config>> {
  using Base = SmallBatch<Config, Decoder<Config>>;
  friend Base;
  using Weight = typename Config::Weight;
  using Scalar = typename Config::Scalar;
  using Rows = typename Config::Rows;
  // 4-bit integers are multiplied with their bias, all others as values.
  static constexpr bool BIASED = dequant::kIsBiased4<Weight>;
  // A fragment is a group: scaling it takes as many instructions as scaling the sums of one tile of
  // tokens. e4m3 times 4-bit floats is exact.
  static constexpr bool SCALE_WEIGHTS = Config::GROUP == 16 && Config::TOKEN_TILES > 1;
  using Operand = dequant::SmallBatchOperand<Weight, Scalar, SCALE_WEIGHTS>;
  // True value of a sum.
  static constexpr float kUnit = BIASED ? dequant::BiasedPair<Scalar>::kUnit
                                        : dequant::unit_of_sums<Operand, SCALE_WEIGHTS>();
  using Tokens = uint32_t[Config::TOKEN_TILES][2][4];  // as in multiply_tile
  using Base::activations_, Base::block_range_, Base::cursor_, Base::first_tile_, Base::lane_;
  using Base::p_, Base::row_bytes_, Base::shared_, Base::tiles_, Base::total_, Base::warp_;

 public:
  __device__ __forceinline__ explicit Decoder(const Problem<Scalar>& p)
      : Base(p), tables_(p.m >> 31 & threadIdx.x) {}

 private:
  // ---- weights ----
  __device__ __forceinline__ void enter_column() {
    const ColumnPair pair(cursor_.column / 2, p_.column_tiles);
    width_ = pair.width;
    codes_ = p_.weights + (pair.offset(first_tile_, p_.k_tiles) + cursor_.column % 2) *
                              kTileBytes<Weight>;
    rows_ = p_.scales + (pair.offset(0, Rows::units(p_.k_tiles)) + cursor_.column % 2) *
                            Rows::kUnitBytes;
  }

  __device__ __forceinline__ void fetch_tile(uint8_t* target, uint64_t* full) const {
    ptx::bulk_copy(target, codes_ + cursor_.tile * (width_ * kTileBytes<Weight>),
                   kTileBytes<Weight>, full);
    if constexpr (Config::GROUP != 0)
      ptx::bulk_copy(target + kTileBytes<Weight>,
                     rows_ + Rows::unit_of(first_tile_ + cursor_.tile) *
                                 (width_ * Rows::kUnitBytes),
                     Rows::kBytesPerTile, full);
  }

  // ---- activations ----
  __device__ __forceinline__ void load() { Base::load_activations(); }

  // With act-order: every token's whole row, in the order of the caller, and a zero after it. Warps
  // fetch tokens in turn; the last arrival of a warp also says that its part of the index is there.
  // permutation: [64 k_tiles], activation of each weight row, negative: none.
  __device__ __forceinline__ void load(const int* permutation) {
    write_index(permutation);
    ptx::warp_sync();
    const unsigned long long address = reinterpret_cast<unsigned long long>(p_.activations);
    const unsigned long long stride = p_.row_stride * sizeof(Scalar);
    const bool aligned = (address | (p_.m > 1 ? stride : 0) | p_.k * sizeof(Scalar)) % 16 == 0;
    uint64_t* arrived = &shared_.tokens_full[0];
    ptx::wait_for_predecessors();
    if (aligned) {
      if (ptx::elect_one()) {
        const int bytes = p_.k * static_cast<int>(sizeof(Scalar));
        const int rows = warp_ < p_.m ? (p_.m - 1 - warp_) / Config::WARPS + 1 : 0;
        for (int token = warp_; token < p_.m; token += Config::WARPS)
          row(token)[p_.k] = Element<Scalar>::from_float(0.f);
        ptx::mbarrier_arrive_expect(arrived, rows * bytes);
        for (int token = warp_; token < p_.m; token += Config::WARPS)
          ptx::bulk_copy(row(token), p_.activations + token * p_.row_stride, bytes, arrived);
      }
      return;
    }
    for (int token = 0; token < p_.m; ++token)
      for (int i = threadIdx.x; i <= p_.k; i += Config::THREADS)
        row(token)[i] = i < p_.k ? p_.activations[token * p_.row_stride + i]
                                 : Element<Scalar>::from_float(0.f);
    ptx::warp_sync();
    if (ptx::elect_one()) ptx::mbarrier_arrive(arrived);
  }

  __device__ __forceinline__ Scalar* row(int token) const {
    return reinterpret_cast<Scalar*>(activations_ + token * row_bytes_);
  }

  // Index of the block's k range, in pairs of 16-bit numbers: [tiles][4 lanes][2 halves of 32 k]
  // [4 B registers]. The eight pairs that lanes with the same lane % 4 need for a tile are contiguous.
  __device__ __forceinline__ uint32_t* index_of(int tile) const {
    return reinterpret_cast<uint32_t*>(activations_ + p_.m * row_bytes_) +
           (tile - block_range_.begin) * (kTileK / 2);
  }

  // Warps that share a run of k write the index of its tiles in turn; k without an activation point
  // to the zero after a row.
  __device__ __forceinline__ void write_index(const int* permutation) {
    const int k = lane_ / 4 % 2 * 32 + chunk(lane_ % 4) * 8 + lane_ / 8 * 2;
    constexpr int kAtOnce = 16;  // loads in flight: one latency for all but long runs
    for (int first = warp_ % Config::WARPS_N; first < tiles_; first += kAtOnce * Config::WARPS_N) {
      int2 columns[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = first + i * Config::WARPS_N;
        const int* place = permutation + (first_tile_ + tile) * kTileK + k;
        if (tile < tiles_) columns[i] = *reinterpret_cast<const int2*>(place);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = first + i * Config::WARPS_N;
        const uint32_t low = columns[i].x < 0 ? p_.k : columns[i].x;
        const uint32_t high = columns[i].y < 0 ? p_.k : columns[i].y;
        if (tile < tiles_) index_of(first_tile_ + tile)[lane_] = low | high << 16;
      }
    }
  }

  // ---- mainloop ----
  // Sums of this warp's run of one column. exists: N' may end before the block's last column.
  __device__ __forceinline__ void multiply(bool exists) {
    Base::clear_sums();
    if (!exists) return;
    // Row of an 8 x 8 matrix that this lane addresses: token lane % 8; tokens that do not exist
    // repeat the last one, and nobody reads their results. A lane gathers for token lane / 4.
    const uint8_t* rows[Config::TOKEN_TILES];
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t) {
      if constexpr (Config::GATHERS) {
        rows[t] = activations_ + min(t * 8 + lane_ / 4, p_.m - 1) * row_bytes_;
        continue;
      }
      const int token = min(t * 8 + lane_ % 8, p_.m - 1);
      rows[t] = activations_ + token * row_bytes_ +
                (first_tile_ - block_range_.begin) * kTileK * static_cast<int>(sizeof(Scalar)) +
                chunk(lane_ / 8) * 16;
    }
    const uint4* index = nullptr;  // this lane's part of it, of the tile
    if constexpr (Config::GATHERS)
      index = reinterpret_cast<const uint4*>(index_of(first_tile_)) + lane_ % 4 * 2;
    for (int tile = 0; tile < tiles_; ++tile) {
      Tokens tokens;
      if constexpr (Config::GATHERS) {
        gather_tokens(tokens, rows, index);
        index += kTileK / 8;
      }
      ptx::mbarrier_wait(&shared_.full[warp_][Base::stage_], Base::parity_);
      multiply_tile(shared_.ring[warp_] + Base::stage_ * Config::STAGE_BYTES, rows, tile, tokens);
      Base::advance();
    }
  }

  // Which 8 of 32 k are the i-th register of tokens.
  static __device__ __forceinline__ int chunk(int i) {
    return BIASED ? dequant::BiasedPair<Scalar>::chunk(i) : i;
  }

  // B operands of a k tile, before its weights are waited for.
  __device__ __forceinline__ void gather_tokens(Tokens& tokens,
                                                const uint8_t* const (&rows)[Config::TOKEN_TILES],
                                                const uint4* index) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = index[half];
      const uint32_t pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int t = 0; t < Config::TOKEN_TILES; ++t) {
          const uint32_t row = static_cast<uint32_t>(rows[t] - activations_);
          constexpr uint32_t kLow = sizeof(Scalar), kHigh = kLow << 8;
          const uint32_t low = element(ptx::dot_16x8(pairs[i], kLow, row));
          const uint32_t high = element(ptx::dot_16x8(pairs[i], kHigh, row));
          tokens[t][half][i] = low | high << 16;
        }
    }
  }

  // Bits of the activation that lies `offset` bytes after the first.
  __device__ __forceinline__ uint32_t element(uint32_t offset) const {
    return *reinterpret_cast<const uint16_t*>(activations_ + offset);
  }

  // gathered: operands of the tokens, if GATHERS.
  __device__ __forceinline__ void multiply_tile(const uint8_t* stage,
                                                const uint8_t* const (&rows)[Config::TOKEN_TILES],
                                                int tile, const Tokens& gathered) {
    constexpr int kLoads = Weight::BITS / 4;  // of 16 bytes
    uint4 words[4 * kLoads];
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i)
      words[i] = reinterpret_cast<const uint4*>(stage)[i * kWarpSize + lane_];
    uint32_t tokens[Config::TOKEN_TILES][2][4];  // [8 tokens][32 k][B registers of two parts]
#pragma unroll
    for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if constexpr (Config::GATHERS) {
#pragma unroll
          for (int i = 0; i < 4; ++i) tokens[t][half][i] = gathered[t][half][i];
        } else {
          ptx::ldmatrix_x4(
              tokens[t][half],
              rows[t] + tile * (kTileK * static_cast<int>(sizeof(Scalar))) + half * 64);
        }
    if constexpr (!BIASED && Operand::TOKENS != 0) {
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            tokens[t][half][i] = ptx::mul2(tokens[t][half][i], Operand::TOKENS, Scalar());
    }

    const uint8_t* rows_of_groups = stage + kTileBytes<Weight>;
    if constexpr (BIASED) {
      constexpr int kPairsPerGroup = Config::GROUP == 32 ? 1 : 2;
#pragma unroll
      for (int first = 0; first < 2; first += kPairsPerGroup)
        multiply_group<kPairsPerGroup>(words, tokens, first,
                                       rows_of_groups + first * kRowBytes<Weight>);
    } else if constexpr (Config::GROUP == 0) {
#pragma unroll
      for (int m = 0; m < 4; ++m) multiply_steps<4>(total_[m], words, tokens, m, 0, nullptr, nullptr);
    } else {
      constexpr int kSteps = Config::GROUP < kTileK ? Config::GROUP / 16 : kStepsPerTile;
#pragma unroll
      for (int first = 0; first < kStepsPerTile; first += kSteps)
        multiply_values<kSteps>(words, tokens, first,
                                rows_of_groups + first / kSteps * kRowBytes<Weight>);
    }
  }

  // ---- values of the codes, exact ----
  // sums += products of STEPS * 16 k, beginning with step `first`, with the 16 features of m.
  // scales: of the features, if SCALE_WEIGHTS.
  template <int STEPS, int WORDS>
  __device__ __forceinline__ void multiply_steps(
      float (&sums)[Config::TOKEN_TILES][4], const uint4 (&words)[WORDS],
      const uint32_t (&tokens)[Config::TOKEN_TILES][2][4], int m, int first,
      const uint32_t* zeros, const uint32_t* scales) {
#pragma unroll
    for (int step = first; step < first + STEPS; ++step) {
      uint32_t code[kLaneWords<Weight>];
      if constexpr (Weight::BITS == 8) {
        const uint4& v = words[2 * m + step / 2];
        code[0] = step % 2 == 0 ? v.x : v.z;
        code[1] = step % 2 == 0 ? v.y : v.w;
      } else {
        const uint4& v = words[m];
        code[0] = step == 0 ? v.x : step == 1 ? v.y : step == 2 ? v.z : v.w;
      }
      uint32_t a[4];
      Operand::fragment(a, code, zeros, m, tables_);
      if constexpr (SCALE_WEIGHTS) Operand::apply(a, scales, m);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t) {
        const uint32_t(&chunks)[4] = tokens[t][step / 2];
        const uint32_t b[2] = {chunks[step % 2 * 2], chunks[step % 2 * 2 + 1]};
        ptx::mma_m16n8k16(sums[t], a, b, Scalar());
      }
    }
  }

  // Add the product of STEPS * 16 k, which share the scales of `row`, to total_.
  template <int STEPS, int WORDS>
  __device__ __forceinline__ void multiply_values(
      const uint4 (&words)[WORDS], const uint32_t (&tokens)[Config::TOKEN_TILES][2][4], int first,
      const uint8_t* row) {
    dequant::GroupRegisters<Weight> group = {};
    group.load_scales(row, lane_ / 4);
    group.load_zeros(row + kScaleRowBytes<Weight>, lane_ / 4);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if constexpr (SCALE_WEIGHTS) {
        multiply_steps<STEPS>(total_[m], words, tokens, m, first, group.zeros, group.scales);
        continue;
      }
      float sums[Config::TOKEN_TILES][4] = {};
      multiply_steps<STEPS>(sums, words, tokens, m, first, group.zeros, nullptr);
      const float2 scale = dequant::ScalePair<Weight>::get(group.scales, m);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) total_[m][t][i] += (i < 2 ? scale.x : scale.y) * sums[t][i];
    }
  }

  // ---- 4-bit integers with their bias ----
  // Add the product of PAIRS * 32 k, beginning with pair `first` of k steps, times its scales to
  // total_.
  template <int PAIRS>
  __device__ __forceinline__ void multiply_group(
      const uint4 (&words)[4], const uint32_t (&tokens)[Config::TOKEN_TILES][2][4], int first,
      const uint8_t* row) {
    using Codes = dequant::BiasedPair<Scalar>;
    constexpr int kUnits = Codes::kUnits;
    constexpr bool ZEROS = Weight::ZEROS != Zeros::NONE;
    // The constant bias of the codes times the tokens, the same for all features: where their sums
    // begin. With zero points: the sums of the tokens.
    float bias[kUnits][Config::TOKEN_TILES][4] = {};
#pragma unroll
    for (int pair = first; pair < first + PAIRS; ++pair)
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int t = 0; t < Config::TOKEN_TILES; ++t) {
          const uint32_t factor = ZEROS ? Codes::one(part) : Codes::bias(part);
          const uint32_t a[4] = {factor, factor, factor, factor};
          const uint32_t b[2] = {tokens[t][pair][2 * part], tokens[t][pair][2 * part + 1]};
          ptx::mma_m16n8k16(bias[Codes::unit(part)][t], a, b, Scalar());
        }
    dequant::GroupRegisters<Weight> group = {};
    if constexpr (Config::GROUP != 0) group.load_scales(row, lane_ / 4);
    group.load_zeros(row + kScaleRowBytes<Weight>, lane_ / 4);
    if constexpr (ZEROS && kUnits == 2) {
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) bias[0][t][i] += Codes::kSecond * bias[kUnits - 1][t][i];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float sums[kUnits][Config::TOKEN_TILES][4];
      if constexpr (ZEROS) {
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
          for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[unit][t][i] = 0.f;
      }
#pragma unroll
      for (int pair = first; pair < first + PAIRS; ++pair)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          uint32_t a[4];
          Codes::codes(a, part, pair == 0 ? words[m].x : words[m].z,
                       pair == 0 ? words[m].y : words[m].w);
          constexpr int kFirstOfUnit = kUnits == 2 ? 2 : 1;  // parts that begin a sum
          const int unit = Codes::unit(part);
#pragma unroll
          for (int t = 0; t < Config::TOKEN_TILES; ++t) {
            const uint32_t b[2] = {tokens[t][pair][2 * part], tokens[t][pair][2 * part + 1]};
            if (!ZEROS && pair == first && part < kFirstOfUnit)
              ptx::mma_add_m16n8k16(sums[unit][t], a, b, bias[unit][t], Scalar());
            else
              ptx::mma_m16n8k16(sums[unit][t], a, b, Scalar());
          }
        }
      float2 scale = make_float2(1.f, 1.f);
      if constexpr (Config::GROUP != 0)
        scale = __half22float2(*reinterpret_cast<const __half2*>(&group.scales[m]));
      float2 zero = make_float2(0.f, 0.f);
      if constexpr (ZEROS) zero = dequant::zero_pair<Scalar>(group, m);
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum = sums[0][t][i];
          if constexpr (kUnits == 2) sum += Codes::kSecond * sums[kUnits - 1][t][i];
          if constexpr (ZEROS) sum -= (i < 2 ? zero.x : zero.y) * bias[0][t][i];
          total_[m][t][i] += (i < 2 ? scale.x : scale.y) * sum;
        }
    }
  }

  // ---- output ----
  __device__ __forceinline__ float column_scale(int n) const {
    float scale = kUnit;
    if constexpr (Weight::SCALES == Scales::E4M3) scale *= *p_.global_scale;
    if constexpr (Config::GROUP == 0) {
      if (n < p_.n)
        scale *= __half2float(reinterpret_cast<const __half*>(p_.scales)[column_scale_index(n)]);
    }
    return scale;
  }

  const typename Operand::Tables tables_;
  const uint8_t* codes_ = nullptr;  // of the cursor's column, tile first_tile_
  const uint8_t* rows_ = nullptr;   // of its first group
  int width_ = 0;                   // of its pair of columns
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    decode_kernel(const __grid_constant__ Problem<typename Config::Scalar> problem) {
  Decoder<Config>(problem).run();
}

// The same with act-order: K of the activations is that of the problem, `permutation` has K'.
template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    decode_gather_kernel(const __grid_constant__ Problem<typename Config::Scalar> problem,
                         const int* permutation) {
  static_assert(Config::GATHERS, "decode_kernel takes activations in the order of the weights");
  Decoder<Config>(problem).run(permutation);
}

}  // namespace sm90
