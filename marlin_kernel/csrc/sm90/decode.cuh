// Small batches: one pass over the weights at memory speed.
//
// Blocks are persistent: each loads the activations of its part of k once, and walks over columns
// of 64 features. Warps of a block share the k range of a column; each has a private ring of bulk
// copies of weight tiles, which runs on from column to column and is filled before anything else
// happens and before the preceding kernel has ended (weights do not depend on it). Nothing
// synchronises warps until their sums of a column are complete; those are added in a fixed order,
// first within the block, then, pushed through distributed shared memory, over the cluster that
// shares the column's k range. The split depends on K and N alone.
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
#include "ptx/barrier.cuh"
#include "ptx/bit_ops.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/mma_add.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared_memory.cuh"
#include "sm90/decode_config.cuh"

namespace sm90 {

template <class Config>
class Decoder {
  using Weight = typename Config::Weight;
  using Scalar = typename Config::Scalar;
  using Rows = typename Config::Rows;
  using Operand = dequant::Operand<Weight, Scalar>;
  using Storage = DecodeStorage<Config>;
  static_assert(sizeof(Storage) == Config::STORAGE_BYTES,
                "the host's formula for shared memory must agree with the struct");
  // 4-bit integers are multiplied with their bias, all others as values.
  static constexpr bool BIASED = dequant::kIsBiased4<Weight>;
  // True value of a sum.
  static constexpr float kUnit =
      BIASED ? dequant::BiasedPair<Scalar>::kUnit : Operand::UNIT;
  using Accumulators = float[4][Config::TOKEN_TILES][4];  // [16 features][8 tokens][fragment]
  using Tokens = uint32_t[Config::TOKEN_TILES][2][4];  // as in multiply_tile

 public:
  __device__ __forceinline__ Decoder(const Problem<Scalar>& p)
      : p_(p),
        shared_(ptx::shared_memory<Storage>()),
        activations_(reinterpret_cast<uint8_t*>(&shared_ + 1)),
        warp_(ptx::warp_uniform(threadIdx.x / kWarpSize)),
        lane_(threadIdx.x % kWarpSize),
        tables_(p.m >> 31 & threadIdx.x),
        rank_(Config::SPLIT > 1 ? static_cast<int>(blockIdx.x) : 0),
        block_range_(p.k_tiles, rank_, Config::SPLIT),
        cursor_{static_cast<int>(blockIdx.y) * Config::WARPS_N + warp_ % Config::WARPS_N} {
    const Range mine(block_range_.size(), warp_ / Config::WARPS_N, Config::WARPS_K);
    first_tile_ = block_range_.begin + mine.begin;
    tiles_ = mine.size();
    const int row_tiles = Config::GATHERS ? p.k_tiles : block_range_.size();
    row_bytes_ = row_tiles * kTileK * static_cast<int>(sizeof(Scalar)) + 16;
  }

  // permutation: [64 k_tiles], activation of each weight row, negative: none; null unless GATHERS.
  __device__ __forceinline__ void run(const int* permutation) {
    start_pipeline();
    ptx::launch_dependents();
    if constexpr (Config::SPLIT > 1) ptx::cluster_arrive();
    ptx::block_sync();  // barriers of activations are initialised
    if constexpr (Config::GATHERS)
      load_whole_activations(permutation);
    else
      load_activations();
    const int blocks = ceil_div(p_.column_tiles, Config::WARPS_N);
    int parity = 0;  // of the place of sums from the cluster
    for (int block = blockIdx.y; block < blocks; block += gridDim.y) {
      load_epilogue_operands(block);
      if (block == blockIdx.y) wait_for_activations();
      multiply(block * Config::WARPS_N + warp_ % Config::WARPS_N < p_.column_tiles);
      add_warps(parity, block == blockIdx.y);
      write_output(parity, block);
      if constexpr (Config::SPLIT > 1) parity ^= 1;
    }
  }

 private:
  // ---- weights: private ring of this warp ----
  // The next tile to fetch: of a column, and of this warp's run of k.
  struct Cursor {
    int column;
    int tile = 0;
    const uint8_t* codes = nullptr;   // of the column's tile first_tile_
    const uint8_t* rows = nullptr;    // of the column's first group
    int width = 0;                    // of the column's pair
  };

  __device__ __forceinline__ bool fetches() const { return cursor_.column < p_.column_tiles; }

  __device__ __forceinline__ void enter_column() {
    const ColumnPair pair(cursor_.column / 2, p_.column_tiles);
    cursor_.width = pair.width;
    cursor_.codes = p_.weights + (pair.offset(first_tile_, p_.k_tiles) + cursor_.column % 2) *
                                     kTileBytes<Weight>;
    cursor_.rows = p_.scales + (pair.offset(0, Rows::units(p_.k_tiles)) + cursor_.column % 2) *
                                   Rows::kUnitBytes;
  }

  // Fetch the next tile into `stage`; all lanes take part.
  __device__ __forceinline__ void fetch(int stage) {
    if (ptx::elect_one()) {
      uint64_t* full = &shared_.full[warp_][stage];
      uint8_t* target = shared_.ring[warp_] + stage * Config::STAGE_BYTES;
      ptx::mbarrier_arrive_expect(full, Config::STAGE_BYTES);
      ptx::bulk_copy(target, cursor_.codes + cursor_.tile * (cursor_.width * kTileBytes<Weight>),
                     kTileBytes<Weight>, full);
      if constexpr (Config::GROUP != 0)
        ptx::bulk_copy(target + kTileBytes<Weight>,
                       cursor_.rows + Rows::unit_of(first_tile_ + cursor_.tile) *
                                          (cursor_.width * Rows::kUnitBytes),
                       Rows::kBytesPerTile, full);
    }
    if (++cursor_.tile == tiles_) {
      cursor_.tile = 0;
      cursor_.column += static_cast<int>(gridDim.y) * Config::WARPS_N;
      if (fetches()) enter_column();
    }
  }

  __device__ __forceinline__ void start_pipeline() {
    if (ptx::elect_one()) {
#pragma unroll
      for (int stage = 0; stage < Config::STAGES; ++stage)
        ptx::mbarrier_init(&shared_.full[warp_][stage], 1);
      if constexpr (Config::GATHERS) {
        if (warp_ == 0) ptx::mbarrier_init(&shared_.tokens_full[0], Config::WARPS);
      } else if (warp_ % Config::WARPS_N == 0) {
        ptx::mbarrier_init(&shared_.tokens_full[warp_ / Config::WARPS_N], Config::WARPS_N);
      }
      ptx::fence_mbarrier_init();
    }
    ptx::warp_sync();
    if (tiles_ == 0) cursor_.column = p_.column_tiles;  // fewer tiles along k than warps
    if (fetches()) enter_column();
#pragma unroll 1
    for (int stage = 0; stage < Config::STAGES && fetches(); ++stage) fetch(stage);
  }

  // ---- activations: the block's k range of every token, rows padded by 16 bytes against bank
  // conflicts. Warps that share a k run fetch its tokens in turn, all copies in flight at once.
  __device__ __forceinline__ void load_activations() {
    const unsigned long long address = reinterpret_cast<unsigned long long>(p_.activations);
    const unsigned long long stride = p_.row_stride * sizeof(Scalar);
    const bool aligned = (address | (p_.m > 1 ? stride : 0) | p_.k * sizeof(Scalar)) % 16 == 0;
    const int run = warp_ / Config::WARPS_N;
    const int first_k = first_tile_ * kTileK;
    const int wanted = tiles_ * kTileK;
    const int there = min(max(p_.k - first_k, 0), wanted);
    uint8_t* target = activations_ + (first_k - block_range_.begin * kTileK) *
                                         static_cast<int>(sizeof(Scalar));
    if (aligned && wanted > 0 && first_k + wanted <= p_.k) {
      ptx::wait_for_predecessors();
      if (ptx::elect_one()) {
        const int bytes = wanted * static_cast<int>(sizeof(Scalar));
        const int rows = ceil_div(p_.m - warp_ % Config::WARPS_N, Config::WARPS_N);
        ptx::mbarrier_arrive_expect(&shared_.tokens_full[run], rows * bytes);
        for (int token = warp_ % Config::WARPS_N; token < p_.m; token += Config::WARPS_N)
          ptx::bulk_copy(target + token * row_bytes_,
                         p_.activations + token * p_.row_stride + first_k, bytes,
                         &shared_.tokens_full[run]);
      }
      return;
    }
    // Odd addresses, or a run that reaches into the padding of K.
    ptx::wait_for_predecessors();
    for (int token = warp_ % Config::WARPS_N; token < p_.m; token += Config::WARPS_N)
      for (int i = lane_; i < wanted; i += kWarpSize)
        reinterpret_cast<Scalar*>(target + token * row_bytes_)[i] =
            i < there ? p_.activations[token * p_.row_stride + first_k + i]
                      : Element<Scalar>::from_float(0.f);
    ptx::warp_sync();
    if (ptx::elect_one()) ptx::mbarrier_arrive(&shared_.tokens_full[run]);
  }

  __device__ __forceinline__ void wait_for_activations() {
    if constexpr (Config::GATHERS) {
      ptx::mbarrier_wait(&shared_.tokens_full[0], 0);
    } else {
      ptx::mbarrier_wait(&shared_.tokens_full[warp_ / Config::WARPS_N], 0);
    }
  }

  // ---- act-order: every token's whole row, in the order of the caller, and a zero after it. Warps
  // fetch tokens in turn; the last arrival of a warp also says that its part of the index is there.
  __device__ __forceinline__ void load_whole_activations(const int* permutation) {
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
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) total_[m][t][i] = 0.f;
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
      ptx::mbarrier_wait(&shared_.full[warp_][stage_], parity_);
      multiply_tile(shared_.ring[warp_] + stage_ * Config::STAGE_BYTES, rows, tile, tokens);
      ptx::warp_sync();
      if (fetches()) fetch(stage_);
      if (++stage_ == Config::STAGES) {
        stage_ = 0;
        parity_ ^= 1;
      }
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

    const uint8_t* rows_of_groups = stage + kTileBytes<Weight>;
    if constexpr (BIASED) {
      constexpr int kPairsPerGroup = Config::GROUP == 32 ? 1 : 2;
#pragma unroll
      for (int first = 0; first < 2; first += kPairsPerGroup)
        multiply_group<kPairsPerGroup>(words, tokens, first,
                                       rows_of_groups + first * kRowBytes<Weight>);
    } else if constexpr (Config::GROUP == 0) {
#pragma unroll
      for (int m = 0; m < 4; ++m) multiply_steps<4>(total_[m], words, tokens, m, 0, nullptr);
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
  template <int STEPS, int WORDS>
  __device__ __forceinline__ void multiply_steps(
      float (&sums)[Config::TOKEN_TILES][4], const uint4 (&words)[WORDS],
      const uint32_t (&tokens)[Config::TOKEN_TILES][2][4], int m, int first,
      const uint32_t* zeros) {
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
      float sums[Config::TOKEN_TILES][4] = {};
      multiply_steps<STEPS>(sums, words, tokens, m, first, group.zeros);
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

  // ---- reduction and output ----
  // Leave this warp's sums in shared memory ([64 features][tokens]), add those of the warps that
  // share a column in order of k, and hand each feature to the rank of the cluster that writes it.
  __device__ __forceinline__ void add_warps(int parity, bool first) {
    float* mine = shared_.partial[warp_];
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int t = 0; t < Config::TOKEN_TILES; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int feature = m * 16 + h * 8 + lane_ / 4;
          *reinterpret_cast<float2*>(mine + feature * Config::TOKENS + t * 8 + lane_ % 4 * 2) =
              make_float2(total_[m][t][2 * h], total_[m][t][2 * h + 1]);
        }
    ptx::block_sync();
    if constexpr (Config::SPLIT > 1)
      if (first) ptx::cluster_wait();  // every block of the cluster has started

    constexpr int kQuads = Config::TOKENS / 4;
    constexpr int kItems = Config::FEATURES * kQuads;
#pragma unroll
    for (int item = threadIdx.x; item < kItems; item += Config::THREADS) {
      const int feature = item / kQuads;
      const int quad = item % kQuads;
      if (quad * 4 >= p_.m) continue;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int wk = 0; wk < Config::WARPS_K; ++wk) {
        const float* sums = shared_.partial[wk * Config::WARPS_N + feature / kTileN];
        const float4 part =
            reinterpret_cast<const float4*>(sums)[feature % kTileN * kQuads + quad];
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      const int owner = feature / Config::FEATURES_PER_RANK;
      float* target =
          &shared_.received[parity][rank_][feature % Config::FEATURES_PER_RANK][quad * 4];
      if constexpr (Config::SPLIT > 1)
        ptx::store_remote(target, owner, sum);
      else
        *reinterpret_cast<float4*>(target) = sum;
    }
    if constexpr (Config::SPLIT > 1) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    } else {
      ptx::block_sync();
    }
  }

  static constexpr int kOutThreads =
      Config::THREADS < Config::FEATURES_PER_RANK ? Config::THREADS : Config::FEATURES_PER_RANK;
  static constexpr int kOutFeatures = Config::FEATURES_PER_RANK / kOutThreads;  // of one thread

  __device__ __forceinline__ int out_feature(int i) const {
    return rank_ * Config::FEATURES_PER_RANK + i * kOutThreads + threadIdx.x % kOutThreads;
  }

  // Bias and per-column scales of the features that this thread will write: fetched while weights
  // stream.
  __device__ __forceinline__ void load_epilogue_operands(int block) {
#pragma unroll
    for (int i = 0; i < kOutFeatures; ++i) {
      const int n = block * Config::FEATURES + out_feature(i);
      bias_[i] = p_.bias != nullptr && n < p_.n ? Element<Scalar>::to_float(p_.bias[n]) : 0.f;
      scale_[i] = kUnit;
      if constexpr (Weight::SCALES == Scales::E4M3) scale_[i] *= *p_.global_scale;
      if constexpr (Config::GROUP == 0) {
        if (n < p_.n)
          scale_[i] *=
              __half2float(reinterpret_cast<const __half*>(p_.scales)[column_scale_index(n)]);
      }
    }
  }

  __device__ __forceinline__ void write_output(int parity, int block) {
#pragma unroll
    for (int i = 0; i < kOutFeatures; ++i) {
      const int feature = i * kOutThreads + threadIdx.x % kOutThreads;
      const int n = block * Config::FEATURES + out_feature(i);
      if (n >= p_.n) continue;
      for (int token = threadIdx.x / kOutThreads; token < p_.m;
           token += Config::THREADS / kOutThreads) {
        float sum = 0.f;
#pragma unroll
        for (int source = 0; source < Config::SPLIT; ++source)
          sum += shared_.received[parity][source][feature][token];
        p_.out[static_cast<long long>(token) * p_.n + n] =
            Element<Scalar>::from_float(sum * scale_[i] + bias_[i]);
      }
    }
  }

  const Problem<Scalar>& p_;
  Storage& shared_;
  uint8_t* const activations_;  // [m][row_bytes_], and the index if they are gathered
  const int warp_;
  const int lane_;
  const typename Operand::Tables tables_;
  const int rank_;           // in the cluster
  const Range block_range_;  // k tiles of this block
  int first_tile_;           // first k tile of this warp
  int tiles_;                // number of them
  int row_bytes_;            // between tokens in shared memory
  Cursor cursor_;            // next tile to fetch
  int stage_ = 0;            // next stage to multiply
  uint32_t parity_ = 0;      // of its barrier
  Accumulators total_;
  float bias_[kOutFeatures];
  float scale_[kOutFeatures];
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    decode_kernel(const __grid_constant__ Problem<typename Config::Scalar> problem) {
  Decoder<Config>(problem).run(nullptr);
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
