// Warpgroup kernel: tiles of FEATURES x TOKENS outputs by wgmma, weights as the register operand.
//
// A ring of stages (64 k each) is fed by bulk copies of codes and scales and by tensor copies of
// activations, with the 128-byte swizzle and with zeros for what lies outside the matrix. Two
// to four warpgroups each turn their 64-feature tiles into A fragments and multiply them with all tokens of
// the stage. Fragments are double-buffered: a step is dequantized while the multiplications of the
// step before are under way. Where a stage holds a whole group of 128 k its scales are used once.
//
// Copies of weights start before the preceding kernel has ended; activations wait for it.
//
// Blocks are persistent and walk over work items: a tile, or one of `split` parts of a tile's k
// range, or (SPREAD) the stretches of tiles that a block's equal share of the last tiles consists of.
// Parts are added in order of k: through the shared memory of a cluster (CLUSTER == split; faster,
// but clusters do not fit on every multiprocessor), or through global memory by whoever finishes the
// last part (nothing waits for another block), or (SPREAD) by the block that has the last stretch.
#pragma once

#include "common/copy_rows.cuh"
#include "dequant/operand.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/gemm_config.cuh"

namespace sm90 {

// Position in the ring: stage index and the parity of its barriers' phase.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A work item: a whole tile, or one part of the k range of a tile. Tiles are numbered so that
// blocks running at the same time share both weights and activations: within a band of kBand token
// tiles, token tiles first. The last tiles may be split, so that all blocks end at about the same
// time.
struct WorkItem {
  static constexpr int kBand = 8;
  int part, parts;  // of the tile's k range
  int shared_tile;  // number of the tile among those that are split
  int begin, end;   // SPREAD: of the tile's stages
  int column_block, token_block;
  __device__ __forceinline__ WorkItem(int item, int whole_tiles, int split, int column_blocks,
                                      int token_blocks) {
    int tile = item;
    part = 0;
    parts = 1;
    shared_tile = 0;
    if (item >= whole_tiles) {
      shared_tile = (item - whole_tiles) / split;
      part = item - whole_tiles - shared_tile * split;
      parts = split;
      tile = whole_tiles + shared_tile;
    }
    const int band = tile / (kBand * column_blocks);
    const int in_band = tile - band * kBand * column_blocks;
    const int height = min(kBand, token_blocks - band * kBand);
    column_block = in_band / height;
    token_block = band * kBand + in_band % height;
  }
};

// The items of this block. They are numbered: whole tiles first, then parts, or (SPREAD) the stages
// of the tiles that are split, one after another, of which each block has an equal share.
template <class Config>
struct Walk {
  int item, items;
  template <class Problem>
  __device__ __forceinline__ explicit Walk(const Problem& p)
      : item(static_cast<int>(blockIdx.x)), items(p.whole_tiles + split_tiles(p) * p.split) {
    if constexpr (Config::SPREAD) {
      items = kDone;
      if (item >= p.whole_tiles) enter_share(p);
    }
  }
  template <class Problem>
  static __device__ __forceinline__ int column_blocks(const Problem& p) {
    return ceil_div(p.column_tiles, Config::COLUMNS);
  }
  template <class Problem>
  static __device__ __forceinline__ int token_blocks(const Problem& p) {
    return ceil_div(p.m, Config::TOKENS);
  }
  template <class Problem>
  static __device__ __forceinline__ int split_tiles(const Problem& p) {
    return fresh(column_blocks(p) * token_blocks(p) - p.whole_tiles);
  }
  template <class Problem>
  static __device__ __forceinline__ int stages(const Problem& p) {  // of a tile
    return fresh(ceil_div(p.k_tiles, Config::STAGE_TILES));
  }
  __device__ __forceinline__ bool done() const { return item >= items; }
  template <class Problem>
  __device__ __forceinline__ void next(const Problem& p) {
    if (!Config::SPREAD || item < p.whole_tiles) {
      item += static_cast<int>(gridDim.x);
      if (Config::SPREAD && item >= p.whole_tiles) enter_share(p);
    } else {  // the tile before, as far as the share goes
      item -= (item - p.whole_tiles) % stages(p) + 1;
      if (item < share_begin(blockIdx.x, p)) item = kDone;
    }
  }
  template <class Problem>
  __device__ __forceinline__ WorkItem get(const Problem& p) const {
    const int split = Config::SPREAD ? stages(p) : p.split;
    WorkItem work(item, p.whole_tiles, split, column_blocks(p), token_blocks(p));
    if constexpr (Config::SPREAD) {
      work.begin = 0;
      work.end = split;
      if (item >= p.whole_tiles) {  // the part so far is the last stage
        const int first = work.shared_tile * split, owner = owner_of(first, p);
        work.begin = max(0, share_begin(blockIdx.x, p) - p.whole_tiles - first);
        work.end = work.part + 1;
        work.part = static_cast<int>(blockIdx.x) - owner;
        work.parts = owner_of(first + split - 1, p) - owner + 1;
      }
    }
    return work;
  }

 private:
  static constexpr int kDone = 0x7fffffff;
  // Keeps what shares are worked out from out of registers while products need them.
  static __device__ __forceinline__ int fresh(int value) {
    if constexpr (Config::SPREAD) ptx::pin_register(value);
    return value;
  }
  // A share is walked from its end: the first stretch of a tile, which its last one is added to, has
  // then been finished long before that one.
  template <class Problem>
  __device__ __forceinline__ void enter_share(const Problem& p) {
    const int end = share_begin(blockIdx.x + 1, p);
    item = end > share_begin(blockIdx.x, p) ? end - 1 : kDone;
  }
  // Stages of the tiles that are split, and blocks that have a share of them: the first ones.
  template <class Problem>
  static __device__ __forceinline__ unsigned split_stages(const Problem& p) {
    return split_tiles(p) * stages(p);
  }
  template <class Problem>
  static __device__ __forceinline__ unsigned sharers(const Problem& p) {
    return min(gridDim.x, split_stages(p));
  }
  // Number of the first item of a block's share, where that of the block before it ends. Products
  // stay below 2^32: split tiles and blocks are at most as many as fit on the GPU together.
  template <class Problem>
  static __device__ __forceinline__ int share_begin(unsigned block, const Problem& p) {
    const unsigned count = sharers(p);
    if (count == 0) return p.whole_tiles;
    return p.whole_tiles + static_cast<int>(split_stages(p) * min(block, count) / count);
  }
  // The block whose share holds a stage: the last one whose share begins at or before it.
  template <class Problem>
  static __device__ __forceinline__ int owner_of(int stage, const Problem& p) {
    return static_cast<int>(((stage + 1u) * sharers(p) - 1) / split_stages(p));
  }
};

// K tiles of a work item: whole stages, but for the last one of an odd number.
template <class Config, class Problem>
__device__ __forceinline__ Range k_range_of(const WorkItem& item, const Problem& p) {
  Range range(Walk<Config>::stages(p), item.part, item.parts);
  if constexpr (Config::SPREAD) range.begin = item.begin, range.end = item.end;
  range.begin *= Config::STAGE_TILES;
  range.end = min(range.end * Config::STAGE_TILES, p.k_tiles);
  return range;
}

// ---- copies into the ring ----
// One warp; all its lanes run through the loop so that addresses stay in uniform registers, and one
// of them issues the copies.
template <class Config>
class Feeder {
  using Weight = typename Config::Weight;
  using Scalar = typename Config::Scalar;
  using Rows = typename Config::Rows;
  using Storage = GemmStorage<Config>;

  // The next stage to fetch.
  struct Cursor {
    Walk<Config> walk;
    int k_tile = 0;
    int k_end = 0;
    int token = 0;
    int column = 0;   // first column tile of the block
    int columns = 0;  // that exist

    __device__ __forceinline__ void enter_item(const Problem<Scalar>& p) {
      if (walk.done()) return;
      const WorkItem item = walk.get(p);
      const Range range = k_range_of<Config>(item, p);
      k_tile = range.begin;
      k_end = range.end;
      token = item.token_block * Config::TOKENS;
      column = item.column_block * Config::COLUMNS;
      columns = min(Config::COLUMNS, p.column_tiles - column);
    }
    __device__ __forceinline__ void advance(const Problem<Scalar>& p) {
      k_tile += Config::STAGE_TILES;
      if (k_tile >= k_end) {
        walk.next(p);
        enter_item(p);
      }
    }
  };

 public:
  __device__ __forceinline__ Feeder(const Problem<Scalar>& p, const TensorMap* map)
      : p_(p), map_(map), shared_(ptx::shared_memory<Storage>()), cursor_{Walk<Config>(p)} {}

  __device__ __forceinline__ void run() {
    // The first round finds the ring empty: weights at once, activations when the preceding kernel
    // has written them.
    cursor_.enter_item(p_);
    Cursor tokens = cursor_;
#pragma unroll 1
    for (int stage = 0; stage < Config::STAGES && !cursor_.walk.done(); ++stage) {
      if (ptx::elect_one()) fetch_weights(stage);
      cursor_.advance(p_);
    }
    ptx::wait_for_predecessors();
#pragma unroll 1
    for (int stage = 0; stage < Config::STAGES && !tokens.walk.done(); ++stage) {
      if (ptx::elect_one()) fetch_tokens(tokens, stage);
      tokens.advance(p_);
    }
    // From then on a stage is fetched as soon as all warps have released its place.
    RingPosition<Config::STAGES> position;
#pragma unroll 1
    for (; !cursor_.walk.done(); cursor_.advance(p_), position.advance()) {
      ptx::mbarrier_wait(&shared_.empty[position.stage], position.parity);
      if (ptx::elect_one()) {
        fetch_weights(position.stage);
        fetch_tokens(cursor_, position.stage);
      }
    }
  }

 private:
  // The last stage of an odd k range is half full.
  __device__ __forceinline__ int tiles(const Cursor& cursor) const {
    return Config::STAGE_TILES == 1 ? 1 : min(Config::STAGE_TILES, cursor.k_end - cursor.k_tile);
  }

  // Also announces the bytes of the whole stage. A unit of two tiles is always multiplied whole: k
  // ends in the middle of one only where the matrix does, and beyond it activations are zeros.
  __device__ __forceinline__ void fetch_weights(int stage) {
    uint64_t* full = &shared_.full[stage];
    const int count = tiles(cursor_);
    const int rows = Config::GROUP > kTileK ? 1 : count * Rows::kPerTile;
    const int boxes = Config::UNIT_TILES == 2 ? 2 : count;
    ptx::mbarrier_arrive_expect(
        full, boxes * Config::BOX_BYTES + cursor_.columns * (count * kTileBytes<Weight> +
                                                             rows * kRowBytes<Weight>));
#pragma unroll
    for (int i = 0; i < Config::SLOTS; ++i) {
      if (i > 0 && i * Config::SLOT_COLUMNS >= cursor_.columns) break;
      uint8_t* target = shared_.ring.weights[stage][i];
      if constexpr (Config::SLOT_COLUMNS == 1) {
        fetch_column(target, cursor_.column + i, count, full);
        continue;
      }
      const int width = min(2, cursor_.columns - 2 * i);
      const long long column = cursor_.column + 2 * i;
      ptx::bulk_copy(target,
                     p_.weights + (column * p_.k_tiles + cursor_.k_tile * width) *
                                      kTileBytes<Weight>,
                     count * width * kTileBytes<Weight>, full);
      if constexpr (Config::GROUP != 0)
        ptx::bulk_copy(target + Config::SLOT_CODES,
                       p_.scales + (column * Rows::units(p_.k_tiles) +
                                    Rows::unit_of(cursor_.k_tile) * width) *
                                       Rows::kUnitBytes,
                       rows * width * kRowBytes<Weight>, full);
    }
  }

  // One column out of its pair, tile by tile.
  __device__ __forceinline__ void fetch_column(uint8_t* target, int column, int count,
                                               uint64_t* full) {
    const ColumnPair pair(column / 2, p_.column_tiles);
    const int second = column % 2;
#pragma unroll
    for (int t = 0; t < Config::STAGE_TILES; ++t) {
      if (t > 0 && t >= count) break;
      ptx::bulk_copy(target + t * kTileBytes<Weight>,
                     p_.weights + (pair.offset(cursor_.k_tile + t, p_.k_tiles) + second) *
                                      kTileBytes<Weight>,
                     kTileBytes<Weight>, full);
      if (Config::GROUP == 0 || (t > 0 && Config::GROUP > kTileK)) continue;  // one row, or none
      ptx::bulk_copy(target + Config::SLOT_CODES + t * Rows::kUnitBytes,
                     p_.scales + (pair.offset(Rows::unit_of(cursor_.k_tile + t),
                                              Rows::units(p_.k_tiles)) +
                                  second) *
                                     Rows::kUnitBytes,
                     Rows::kUnitBytes, full);
    }
  }

  __device__ __forceinline__ void fetch_tokens(const Cursor& cursor, int stage) {
#pragma unroll
    for (int t = 0; t < Config::STAGE_TILES; ++t)
      if (t == 0 || Config::UNIT_TILES == 2 || cursor.k_tile + t < cursor.k_end)
        ptx::tensor_copy_2d(shared_.ring.tokens[stage][t], map_, (cursor.k_tile + t) * kTileK,
                            cursor.token, &shared_.full[stage]);
  }

  const Problem<Scalar>& p_;
  const TensorMap* map_;
  Storage& shared_;
  Cursor cursor_;
};

// ---- the warpgroups that multiply ----
template <class Config>
class Consumer {
  using Weight = typename Config::Weight;
  using Scalar = typename Config::Scalar;
  using Rows = typename Config::Rows;
  using Operand = dequant::Operand<Weight, Scalar, Config::SCALE_WEIGHTS>;
  using Pair = typename Element<Scalar>::Pair;
  using Storage = GemmStorage<Config>;
  using Mma = ptx::Wgmma<Config::TOKENS, Scalar>;
  static constexpr int SUMS = Config::SUMS;

 public:
  __device__ __forceinline__ explicit Consumer(const Problem<Scalar>& p)
      : p_(p),
        shared_(ptx::shared_memory<Storage>()),
        group_(ptx::warp_uniform(threadIdx.x / kWarpgroupThreads)),
        warp_(ptx::warp_uniform(threadIdx.x / kWarpSize % 4)),
        lane_(threadIdx.x % kWarpSize),
        tables_(p.m >> 31 & threadIdx.x) {}

  __device__ __forceinline__ void run() {
    bool waited = false;
    for (Walk<Config> walk(p_); !walk.done(); walk.next(p_)) {
      WorkItem item = walk.get(p_);
      multiply(item);
      if constexpr (Config::SPREAD) item = again(walk);
      if (!waited) ptx::wait_for_predecessors();  // they may still read what is overwritten here
      waited = true;
      if constexpr (Config::CLUSTER > 1)
        add_cluster(item);
      else if (item.parts == 1 || (Config::SPREAD ? add_stretches(item) : add_parts(item)))
        write_tile(Config::SPREAD ? again(walk) : item);
    }
  }

 private:
  // The item, worked out once more: there are no registers in which to keep its parts.
  __device__ __forceinline__ WorkItem again(Walk<Config>& walk) const {
    ptx::pin_register(walk.item);
    return walk.get(p_);
  }

  // ---- mainloop ----
  __device__ __forceinline__ void multiply(const WorkItem& item) {
#pragma unroll
    for (int m = 0; m < Config::M_TILES; ++m)
#pragma unroll
      for (int i = 0; i < SUMS; ++i) total_[m][i] = 0.f;
    if constexpr (Config::SCALE_SUMS) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) group_sums_[1][i] = 0.f;
      scale_ = make_float2(0.f, 0.f);
    }
    width_ = 1;
    if constexpr (Config::SLOT_COLUMNS == 2)
      width_ = ColumnPair(item.column_block * Config::SLOTS + slot(), p_.column_tiles).width;
    const int units = ceil_div(k_range_of<Config>(item, p_).size(), Config::UNIT_TILES);
    open_stage();
    load_words<0, 0>();
    int i = 0;
#pragma unroll 1
    for (; i + 2 < units; i += 2) {
      multiply_unit<0>(i, true);
      multiply_unit<1>(i + 1, true);
    }
    if (i + 2 == units) {
      multiply_unit<0>(i, true);
      multiply_unit<1>(i + 1, false);
      finish<1>();
    } else {
      multiply_unit<0>(i, false);
      finish<0>();
    }
  }

  // Wait for the stage at position_ and note where it lies.
  __device__ __forceinline__ void open_stage() {
    ptx::mbarrier_wait(&shared_.full[position_.stage], position_.parity);
    stage_ = position_.stage;
    position_.advance();
  }

  // What a step of an even (ODD = 0) or odd unit works on.
  template <int ODD, int STEP>
  struct Step {
    static constexpr int TILE = STEP / Config::STEPS;  // of the unit
    static constexpr int PART = STEP % Config::STEPS / Config::M_TILES;
    static constexpr int M = STEP % Config::M_TILES;
    static constexpr int PLACE =  // of the tile in the stage
        Config::UNIT_TILES == 2 ? TILE : Config::STAGE_TILES == 2 ? ODD : 0;
    static constexpr bool BEGINS_GROUP = TILE == 0;
    static constexpr bool ENDS_GROUP = TILE + 1 == Config::UNIT_TILES;
    static constexpr bool OPENS_STAGE = STEP == 0 && PLACE == 0;
    static constexpr bool ENDS_STAGE =
        STEP + 1 == Config::UNIT_STEPS && PLACE + 1 == Config::STAGE_TILES;
    // Fragments alternate from step to step, sums from group to group.
    static constexpr int FRAGMENTS = (ODD * Config::UNIT_STEPS + STEP) % 2;
    static constexpr int GROUP_SUMS =
        Config::UNIT_TILES == 1 ? FRAGMENTS : (ODD * Config::M_TILES + M) % 2;
    // With both columns' products in turn, each step loads its own scales and zero points.
    static constexpr bool LOADS_ZEROS = BEGINS_GROUP || Config::M_TILES > 1;
    static constexpr bool LOADS_SCALES = Config::SCALE_SUMS ? ENDS_GROUP : LOADS_ZEROS;
  };
  template <int ODD, int STEP>
  struct StepBefore : Step<ODD, STEP - 1> {};
  template <int ODD>
  struct StepBefore<ODD, 0> : Step<1 - ODD, Config::UNIT_STEPS - 1> {};

  // Multiply unit i. more: another one follows.
  template <int ODD, int STEP = 0>
  __device__ __forceinline__ void multiply_unit(int i, bool more) {
    if constexpr (STEP < Config::UNIT_STEPS) {
      using This = Step<ODD, STEP>;
      const int stage = stage_;
      const float2 scale = dequantize<ODD, STEP>();
      const uint64_t tokens =
          ptx::wgmma_descriptor(shared_.ring.tokens[stage][This::PLACE]) +
          This::PART * Config::STEP_K16 * ptx::kWgmmaStepK16;
      ptx::wgmma_fence();
#pragma unroll
      for (int s = 0; s < Config::STEP_K16; ++s) {
        const uint64_t b = tokens + s * ptx::kWgmmaStepK16;
        if constexpr (Config::SCALE_SUMS)
          Mma::mma(group_sums_[This::GROUP_SUMS], fragments_[This::FRAGMENTS][s], b,
                   s > 0 || !This::BEGINS_GROUP);
        else
          Mma::mma(total_[This::M], fragments_[This::FRAGMENTS][s], b, 1);
      }
      ptx::wgmma_commit();
      // Codes of the next step, while these multiplications run.
      if constexpr (STEP + 1 < Config::UNIT_STEPS) {
        load_words<ODD, STEP + 1>();
      } else if (more) {
        if constexpr (This::ENDS_STAGE) open_stage();
        load_words<1 - ODD, 0>();
      }
      ptx::wgmma_wait<1>();  // the step before is complete
      if constexpr (This::OPENS_STAGE) {
        if (i > 0) release(previous_stage_);
        previous_stage_ = stage;
      }
      using Before = StepBefore<ODD, STEP>;
      if constexpr (Before::ENDS_GROUP) add_scaled<Before::GROUP_SUMS, Before::M>();
      if constexpr (This::ENDS_GROUP) scale_ = scale;
      multiply_unit<ODD, STEP + 1>(i, more);
    }
  }

  // Slot of this warpgroup in the stage, and its column of 64-feature tile m in the slot.
  __device__ __forceinline__ int slot() const {
    return group_ * Config::M_TILES / Config::SLOT_COLUMNS;
  }
  __device__ __forceinline__ int column(int m) const {
    return Config::SLOT_COLUMNS == 1 ? 0 : Config::M_TILES == 1 ? group_ % 2 : m;
  }

  // This lane's codes of one step of the open stage, and the scales and zero points it begins with.
  template <int ODD, int STEP>
  __device__ __forceinline__ void load_words() {
    using This = Step<ODD, STEP>;
    constexpr int PLACE = This::PLACE;
    constexpr int PART = This::PART;
    constexpr int M = This::M;
    const uint8_t* weights = shared_.ring.weights[stage_][slot()];
    const uint8_t* codes = weights + (PLACE * width_ + column(M)) * kTileBytes<Weight>;
    if constexpr (Weight::BITS == 8) {
      constexpr int kPairs = Config::STEP_K16 / 2;  // of k steps: 16 bytes each
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(
            codes)[(warp_ * 2 + PART * kPairs + i) * kWarpSize + lane_];
        words_[2 * i][0] = v.x, words_[2 * i][1] = v.y;
        words_[2 * i + 1][0] = v.z, words_[2 * i + 1][1] = v.w;
      }
    } else {
      codes += (warp_ * kWarpSize + lane_) * 16 + PART * Config::STEP_K16 * 4;
      if constexpr (Config::STEP_K16 == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(codes);
        words_[0][0] = v.x, words_[1][0] = v.y, words_[2][0] = v.z, words_[3][0] = v.w;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(codes);
        words_[0][0] = v.x, words_[1][0] = v.y;
      }
    }
#pragma unroll
    for (int i = 0; i < Config::STEP_ROWS; ++i) {
      // A stage of 128 k holds one row of a 128-k group.
      const int tile = Config::GROUP > kTileK ? 0 : PLACE;
      const uint8_t* row =
          weights + Config::SLOT_CODES + (tile * width_ + column(M)) * Rows::kBytesPerTile +
          (PART * Config::STEP_ROWS + i) * kRowBytes<Weight>;
      if constexpr (This::LOADS_SCALES) scale_words_[i] = load_pair<kScaleBytes<Weight>>(row);
      if constexpr (This::LOADS_ZEROS && Weight::ZEROS != Zeros::NONE)
        zero_words_[i] = load_pair<kZeroBytes<Weight>>(row + kScaleRowBytes<Weight>);
    }
  }

  // This lane's two of the eight numbers that lanes with the same lane / 4 share, in the lowest bits
  // (nibbles: in bits 0-3 and 16-19). BYTES: of the eight.
  template <int BYTES>
  __device__ __forceinline__ uint32_t load_pair(const uint8_t* row) const {
    const uint8_t* mine = row + lane_ / 4 * BYTES;
    if constexpr (BYTES == 16) return *reinterpret_cast<const uint32_t*>(mine + warp_ * 4);
    if constexpr (BYTES == 8) return *reinterpret_cast<const uint16_t*>(mine + warp_ * 2);
    return *reinterpret_cast<const uint32_t*>(mine) >> (4 * warp_);
  }

  // Loaded codes to fragments. Returns the scales of rows g and g + 8, if the step ends a group whose
  // sums are scaled.
  template <int ODD, int STEP>
  __device__ __forceinline__ float2 dequantize() {
    using This = Step<ODD, STEP>;
#pragma unroll
    for (int s = 0; s < Config::STEP_K16; ++s) {
      const int row = s * Config::STEP_ROWS / Config::STEP_K16;
      Operand::fragment(fragments_[This::FRAGMENTS][s], words_[s], &zero_words_[row], 0, tables_);
      if constexpr (Config::SCALE_WEIGHTS)
        Operand::apply(fragments_[This::FRAGMENTS][s], &scale_words_[row], 0);
    }
    if constexpr (Config::SCALE_SUMS && This::ENDS_GROUP)
      return dequant::ScalePair<Weight>::get(scale_words_, 0);
    return make_float2(1.f, 1.f);
  }

  // total += scale * sums of the group whose multiplications have completed.
  template <int BUFFER, int M>
  __device__ __forceinline__ void add_scaled() {
    if constexpr (Config::SCALE_SUMS) {
      ptx::pin_registers(group_sums_[BUFFER]);
#pragma unroll
      for (int i = 0; i < SUMS; ++i)
        total_[M][i] += (i % 4 < 2 ? scale_.x : scale_.y) * group_sums_[BUFFER][i];
    }
  }

  // After the last unit, an even (ODD = 0) or odd one.
  template <int ODD>
  __device__ __forceinline__ void finish() {
    ptx::wgmma_wait<0>();
    release(stage_);
    add_scaled<Step<ODD, Config::UNIT_STEPS - 1>::GROUP_SUMS, Config::M_TILES - 1>();
#pragma unroll
    for (int m = 0; m < Config::M_TILES; ++m) ptx::pin_registers(total_[m]);
  }

  // Lane 0 speaks for its warp: the warp-wide products that consumed what the lanes read have been
  // issued. (A warp barrier here would say so to racecheck, but makes the compiler serialise
  // wgmma.)
  __device__ __forceinline__ void release(int stage) {
    if (lane_ == 0) ptx::mbarrier_arrive(&shared_.empty[stage]);
  }

  // ---- tiles in several parts ----
  // Leave this part's sums in global memory. Whoever finishes the last part of a tile adds them in
  // order of k into total_, and gets true. The warpgroups of a block do this independently.
  __device__ __forceinline__ bool add_parts(const WorkItem& item) {
    constexpr int kQuads = Config::M_TILES * SUMS / 4;  // of a lane
    const int lane = threadIdx.x % kWarpgroupThreads;
    float4* parts = reinterpret_cast<float4*>(p_.partials) +
                    static_cast<long long>(item.shared_tile * Config::WARPGROUPS + group_) * p_.split *
                        kQuads * kWarpgroupThreads +
                    lane;
    float4* mine = parts + item.part * kQuads * kWarpgroupThreads;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) ptx::store_l2(mine + q * kWarpgroupThreads, quad(q));
    ptx::device_fence();
    ptx::named_sync(1 + group_, kWarpgroupThreads);
    int* counter = p_.counters + item.shared_tile * Config::WARPGROUPS + group_;
    if (lane == 0) {
      const int before = ptx::atomic_add(counter, 1);
      ptx::device_fence();
      if (before == p_.split - 1) *counter = 0;
      shared_.arrivals[group_] = before;
    }
    ptx::named_sync(1 + group_, kWarpgroupThreads);
    const bool last = shared_.arrivals[group_] == p_.split - 1;
    ptx::named_sync(1 + group_, kWarpgroupThreads);  // read before the next item overwrites it
    if (!last) return false;
    ptx::device_fence();
    // As many loads as there are registers for are under way together: each takes as long as all.
    constexpr int kRoom = Config::CONSUMER_REGISTERS > 128 ? 16 : 8;
    constexpr int kAtOnce = kQuads < kRoom ? kQuads : kRoom;
#pragma unroll
    for (int first = 0; first < kQuads; first += kAtOnce) {
      float4 sums[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll(kRoom / kAtOnce)
      for (int part = 0; part < p_.split; ++part) {
        const float4* theirs = parts + (part * kQuads + first) * kWarpgroupThreads;
        float4 v[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) v[i] = ptx::load_l2(theirs + i * kWarpgroupThreads);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          sums[i].x += v[i].x;
          sums[i].y += v[i].y;
          sums[i].z += v[i].z;
          sums[i].w += v[i].w;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) set_quad(first + i, sums[i]);
    }
    return true;
  }

  // SPREAD: leave this stretch's sums in global memory; the block of the last one waits for those of
  // the others, adds them to its own in order of k, and gets true. It waits for blocks with smaller
  // numbers only, which have begun before it has.
  __device__ __forceinline__ bool add_stretches(const WorkItem& item) {
    constexpr int kQuads = Config::M_TILES * SUMS / 4;  // of a lane
    constexpr int kAtOnce = kQuads < 16 ? kQuads : 16;  // loads that are under way together
    const int lane = threadIdx.x % kWarpgroupThreads;
    const int place = item.shared_tile * Config::WARPGROUPS + group_;
    float4* parts = reinterpret_cast<float4*>(p_.partials) +
                    static_cast<long long>(place) * p_.split * kQuads * kWarpgroupThreads + lane;
    int* counter = p_.counters + place;
    if (item.part < item.parts - 1) {
      float4* mine = parts + item.part * kQuads * kWarpgroupThreads;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) ptx::store_l2(mine + q * kWarpgroupThreads, quad(q));
      ptx::device_fence();
      ptx::named_sync(1 + group_, kWarpgroupThreads);
      if (lane == 0) ptx::atomic_add(counter, 1);
      return false;
    }
    if (lane == 0) {
      ptx::wait_for_count(counter, item.part);
      *counter = 0;
    }
    ptx::named_sync(1 + group_, kWarpgroupThreads);
    ptx::device_fence();
#pragma unroll 1
    for (int part = 0; part < item.part; ++part) {
      const float4* theirs = parts + part * kQuads * kWarpgroupThreads;
#pragma unroll
      for (int first = 0; first < kQuads; first += kAtOnce) {
        float4 v[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          v[i] = ptx::load_l2(theirs + (first + i) * kWarpgroupThreads);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float4 sum = quad(first + i);
          set_quad(first + i, make_float4(sum.x + v[i].x, sum.y + v[i].y, sum.z + v[i].z,
                                          sum.w + v[i].w));
        }
      }
    }
    return true;
  }

  __device__ __forceinline__ float4 quad(int q) const {
    const float* v = total_[q * 4 / SUMS] + q * 4 % SUMS;
    return make_float4(v[0], v[1], v[2], v[3]);
  }

  __device__ __forceinline__ void set_quad(int q, float4 v) {
    float* to = total_[q * 4 / SUMS] + q * 4 % SUMS;
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  }

  // Each rank of the cluster leaves its sums where its ring was; then each adds one share of the
  // features over all ranks, and writes them.
  __device__ __forceinline__ void add_cluster(const WorkItem& item) {
    using Partial = typename Storage::Partial;
    Partial& partial = *reinterpret_cast<Partial*>(&shared_.ring);
    ptx::named_sync(1, Config::CONSUMERS);  // all warps have read the ring to its end
    const int first_token = item.token_block * Config::TOKENS;
    const int tokens = min(Config::TOKENS, p_.m - first_token);
#pragma unroll
    for (int m = 0; m < Config::M_TILES; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < Config::TOKENS / 8; ++j)
          *reinterpret_cast<float2*>(&partial[feature(m) + 8 * h][j * 8 + lane_ % 4 * 2]) =
              make_float2(total_[m][4 * j + 2 * h], total_[m][4 * j + 2 * h + 1]);
    ptx::cluster_arrive();

    constexpr int kFeatures = Config::FEATURES_PER_RANK;
    constexpr int kAtOnce = Config::CONSUMERS / kFeatures;  // groups of four tokens
    const int f = item.part * kFeatures + threadIdx.x % kFeatures;
    const int n = item.column_block * Config::FEATURES + f;
    const float scale = column_scale(n);
    const float shift = bias(n);
    const bool writes = threadIdx.x < kAtOnce * kFeatures && f < Config::FEATURES && n < p_.n;
    Scalar* out = p_.out + static_cast<long long>(first_token) * p_.n + n;
    ptx::cluster_wait();
    if (writes) {
      // Where registers allow several loads are under way together: each takes as long as all.
      constexpr int kTurns = ceil_div(Config::TOKENS, kAtOnce * 4);
      constexpr int kRoom = Config::CONSUMER_REGISTERS > 128 ? ceil_div(8, Config::CLUSTER) : 1;
      constexpr int kTogether = kTurns < kRoom ? kTurns : kRoom;
#pragma unroll 1
      for (int first = threadIdx.x / kFeatures * 4; first < tokens;
           first += kTogether * kAtOnce * 4) {
        float4 parts[kTogether][Config::CLUSTER];
#pragma unroll
        for (int turn = 0; turn < kTogether; ++turn) {
          const int at = min(first + turn * kAtOnce * 4, Config::TOKENS - 4);
#pragma unroll
          for (int source = 0; source < Config::CLUSTER; ++source)
            parts[turn][source] = ptx::load_remote(&partial[f][at], source);
        }
#pragma unroll
        for (int turn = 0; turn < kTogether; ++turn) {
          const int at = first + turn * kAtOnce * 4;
          float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int source = 0; source < Config::CLUSTER; ++source) {
            sums[0] += parts[turn][source].x;
            sums[1] += parts[turn][source].y;
            sums[2] += parts[turn][source].z;
            sums[3] += parts[turn][source].w;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (at + i < tokens)
              out[static_cast<long long>(at + i) * p_.n] =
                  Element<Scalar>::from_float(sums[i] * scale + shift);
        }
      }
    }
    ptx::warp_sync();
    ptx::cluster_arrive();  // no block may end while others read its sums
    ptx::cluster_wait();
  }

  // ---- output of a tile ----
  // First feature of this lane in 64-feature tile m of this warpgroup; the second is 8 further.
  __device__ __forceinline__ int feature(int m) const {
    return (group_ * Config::M_TILES + m) * kTileN + warp_ * 16 + lane_ / 4;
  }

  // What the sums of feature n lack.
  __device__ __forceinline__ float column_scale(int n) const {
    float scale = dequant::unit_of_sums<Operand, Config::SCALE_WEIGHTS>();
    if constexpr (Weight::SCALES == Scales::E4M3) scale *= *p_.global_scale;
    if constexpr (Config::GROUP != 0) return scale;
    if (n >= p_.n) return 0.f;
    return scale * __half2float(reinterpret_cast<const __half*>(p_.scales)[column_scale_index(n)]);
  }

  __device__ __forceinline__ float bias(int n) const {
    return p_.bias != nullptr && n < p_.n ? Element<Scalar>::to_float(p_.bias[n]) : 0.f;
  }

  __device__ __forceinline__ void write_tile(const WorkItem& item) {
    using Out = typename Storage::Out;
    constexpr int kTokens = Config::OUT_TOKENS;
    auto& out = (*reinterpret_cast<Out*>(shared_.out))[group_];
    const int block_n = item.column_block * Config::FEATURES;
#pragma unroll
    for (int first = 0; first < Config::TOKENS; first += kTokens) {
      const int token = item.token_block * Config::TOKENS + first;
      if (first > 0 && token >= p_.m) break;
#pragma unroll
      for (int m = 0; m < Config::M_TILES; ++m) {
        const int n = block_n + feature(m);
        const float scale[2] = {column_scale(n), column_scale(n + 8)};
        const float shift[2] = {bias(n), bias(n + 8)};
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          const float* sums = &total_[m][first / 2 + 4 * j];
          uint32_t packed[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            Pair pair;
            pair.x = Element<Scalar>::from_float(sums[2 * h] * scale[h] + shift[h]);
            pair.y = Element<Scalar>::from_float(sums[2 * h + 1] * scale[h] + shift[h]);
            packed[h] = *reinterpret_cast<const uint32_t*>(&pair);
          }
          ptx::stmatrix_x2_transposed(
              &out[j * 8 + lane_ % 8][m * kTileN + warp_ * 16 + lane_ / 8 % 2 * 8], packed[0],
              packed[1]);
        }
      }
      ptx::named_sync(1 + group_, kWarpgroupThreads);
      constexpr int kFeatures = Config::M_TILES * kTileN;  // of a warpgroup
      common::copy_rows<kFeatures, kWarpgroupThreads>(out, p_.out, p_.m, p_.n, token,
                                                      block_n + group_ * kFeatures,
                                                      threadIdx.x % kWarpgroupThreads);
      ptx::named_sync(1 + group_, kWarpgroupThreads);
    }
  }

  const Problem<Scalar>& p_;
  Storage& shared_;
  const int group_;  // warpgroup
  const int warp_;   // in the warpgroup
  const int lane_;
  const typename Operand::Tables tables_;
  RingPosition<Config::STAGES> position_;
  int stage_ = 0;           // whose codes are being loaded
  int previous_stage_ = 0;  // to be released
  int width_;     // columns of this warpgroup's slot
  float2 scale_;  // of the step under way
  uint32_t words_[Config::STEP_K16][kLaneWords<Weight>];
  uint32_t scale_words_[Config::STEP_ROWS > 0 ? Config::STEP_ROWS : 1];
  uint32_t zero_words_[Config::STEP_ROWS > 0 ? Config::STEP_ROWS : 1];
  uint32_t fragments_[2][Config::STEP_K16][4];
  float group_sums_[Config::SCALE_SUMS ? 2 : 1][SUMS];
  float total_[Config::M_TILES][SUMS];
};

// The body of both kernels. As a function it would be compiled to other instructions than in place.
#define SM90_GEMM_BODY                                                                          \
  using Storage = GemmStorage<Config>;                                                          \
  static_assert(sizeof(Storage) == Config::STORAGE_BYTES,                                       \
                "the host's formula for shared memory must agree with the struct");             \
  Storage& shared = ptx::shared_memory<Storage>();                                              \
  const int warp = ptx::warp_uniform(threadIdx.x / kWarpSize);                                  \
  constexpr int kFeedingWarp = Config::CONSUMERS / kWarpSize;                                   \
  if (warp == kFeedingWarp && ptx::elect_one()) {                                               \
    ptx::prefetch_tensor_map(&tokens);                                                          \
    for (int stage = 0; stage < Config::STAGES; ++stage) {                                      \
      ptx::mbarrier_init(&shared.full[stage], 1);                                               \
      ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp);                                   \
    }                                                                                           \
    ptx::fence_mbarrier_init();                                                                 \
  }                                                                                             \
  ptx::block_sync();                                                                            \
  ptx::launch_dependents();                                                                     \
  if (warp >= kFeedingWarp) {                                                                   \
    ptx::release_registers<Config::FEEDER_REGISTERS>();                                         \
    if (warp == kFeedingWarp) Feeder<Config>(problem, &tokens).run();                           \
  } else {                                                                                      \
    ptx::acquire_registers<Config::CONSUMER_REGISTERS>();                                       \
    Consumer<Config>(problem).run();                                                            \
  }

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    gemm_kernel(const __grid_constant__ Problem<typename Config::Scalar> problem,
                const __grid_constant__ TensorMap tokens) {
  SM90_GEMM_BODY
}

// The same, and leaves room beside it.
template <class Plain>
__global__ void __maxnreg__(LeavingRoom<Plain>::LAUNCH_REGISTERS)
    roomy_gemm_kernel(const __grid_constant__ Problem<typename Plain::Scalar> problem,
                      const __grid_constant__ TensorMap tokens) {
  using Config = LeavingRoom<Plain>;
  SM90_GEMM_BODY
}

#undef SM90_GEMM_BODY

}  // namespace sm90
