// GEMM of packed weights and 8-bit activations by wgmma (sm_90a); see config.cuh.
//
// The sibling of scaled/kernel.cuh for weights that must be decoded: a ring of stages (128 k each)
// is fed by bulk copies of weight records and by tensor copies of tokens. One warp feeds; each of
// WARPGROUPS warpgroups turns the codes of its 64 features into A fragments and multiplies them with
// all tokens of the stage. Codes of the next stage are decoded while this one is multiplied. Copies
// of weights start before the preceding kernel has ended; activations wait for it.
//
// Warpgroups share the tensor cores and would all write their tiles at the same time, with nothing
// left to multiply. With LEAD the first one starts two stages before the others and stays ahead: it
// writes while the others still multiply, and multiplies while they write.
//
// Sums that move on to FP32 totals do so beside products: those of the same warpgroup, into a second
// set of sums (SETS = 2), or those of the other one (SETS = 1), which leaves registers for larger
// parts of the tokens, whose products take longer. With TURNS the two never issue at the same time,
// so neither do they move sums at the same time.
#pragma once

#include "common/ring.cuh"
#include "dequant/eight_bit_fragment.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/wgmma_8bit_registers.cuh"
#include "scaled/epilogue.cuh"
#include "scaled/walk.cuh"
#include "sm90_8bit/config.cuh"

namespace sm90_8bit {

// ---- copies into the ring: one warp; one of its lanes issues them ----
template <class Config>
class Feeder {
  using Shared = Storage<Config>;
  using Task = Problem<typename Config::Out>;

  // The next stage to fetch.
  struct Cursor {
    scaled::Walk<Config> walk;
    int k = 0, k_end = 0, feature = 0, token = 0;
    __device__ __forceinline__ void enter(const Task& p) {
      if (walk.done()) return;
      walk.place(feature, token);
      k = walk.k_begin(p);
      k_end = walk.k_end(p);
    }
    __device__ __forceinline__ void advance(const Task& p) {
      if (++k >= k_end) {
        walk.next();
        enter(p);
      }
    }
  };

 public:
  __device__ __forceinline__ Feeder(const Task& p, const TensorMap* tokens)
      : p_(p),
        map_(tokens),
        shared_(ptx::shared_memory<Shared>()),
        cursor_{scaled::Walk<Config>(p)} {}

  __device__ __forceinline__ void run() {
    // The first round finds the ring empty: weights at once, activations when the preceding kernel
    // has written them.
    cursor_.enter(p_);
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
    common::RingPosition<Config::STAGES> position;
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
  // Also announces the bytes of the whole stage.
  __device__ __forceinline__ void fetch_weights(int stage) {
    uint64_t* full = &shared_.full[stage];
    const int column = cursor_.feature / kGroupFeatures;
    const int columns = max(0, min(Config::WARPGROUPS, p_.feature_tiles - column));
    ptx::mbarrier_arrive_expect(full, Config::TOKEN_BYTES + columns * Config::RECORD_BYTES);
#pragma unroll
    for (int i = 0; i < Config::WARPGROUPS; ++i)
      if (i < columns)
        ptx::bulk_copy(shared_.ring.weights[stage][i],
                       p_.weights + (static_cast<long long>(column + i) * p_.k_tiles + cursor_.k) *
                                        Config::RECORD_BYTES,
                       Config::RECORD_BYTES, full);
  }

  __device__ __forceinline__ void fetch_tokens(const Cursor& cursor, int stage) {
    uint64_t* full = &shared_.full[stage];
    if constexpr (Config::MULTICAST == 1) {
      ptx::byte_tensor_copy(shared_.ring.tokens[stage], map_, cursor.k * kStageK, cursor.token,
                            full);
    } else {
      constexpr int kShare = Config::TOKENS / Config::MULTICAST;
      const int first = cursor.walk.rank * kShare;
      ptx::byte_tensor_multicast(shared_.ring.tokens[stage] + first * kStageK, map_,
                                 cursor.k * kStageK, cursor.token + first, full,
                                 (1 << Config::MULTICAST) - 1);
    }
  }

  const Task& p_;
  const TensorMap* map_;
  Shared& shared_;
  Cursor cursor_;
};

// ---- the warpgroups that multiply ----
template <class Config>
class Consumer : scaled::Output<Config, Storage<Config>> {
  using Base = scaled::Output<Config, Storage<Config>>;
  using Out = typename Config::Out;
  using Sum = typename Config::Sum;
  using Total = typename Config::Total;
  using Weight = typename Config::Weight;
  using Operand = typename Config::Operand;
  static constexpr bool PROMOTE = Config::PROMOTE;
  static constexpr int MOVES = Config::MOVES;
  static constexpr int BUFFERS = Config::BUFFERS;
  static constexpr int kTurnBarrier = 8;  // and the next: of the two warpgroups that take turns
  static constexpr bool FOUR_BITS = Weight::BITS == 4;
  using Base::group_;
  using Base::lane_;
  using Base::p_;
  using Base::shared_;
  using Base::warp_;

 public:
  __device__ __forceinline__ explicit Consumer(const Problem<Out>& p) : Base(p) {}

  __device__ __forceinline__ void run() {
    ptx::wait_for_predecessors();  // scales of tokens, and what is overwritten
    leads_ = Config::LEAD && group_ == 0;
    if (Config::LEAD && group_ > 0) ptx::mbarrier_wait(&shared_.lead, 0);
    if (Config::TURNS && group_ == 1) pass_turn();
    for (scaled::Walk<Config> walk(p_); !walk.done(); walk.next()) {
      int feature, token;
      walk.place(feature, token);
      this->load_scales(token);
      multiply(walk.k_end(p_) - walk.k_begin(p_));
      if (Config::LEAD) let_others_start();  // should there be fewer than three stages
      // Addresses of the output are derived now, and not kept in registers while multiplying.
      ptx::pin_registers_8bit(lane_);
      this->store_scales();
      if constexpr (Config::SPLIT > 1)
        this->add_cluster(totals_, walk.rank, feature, token);
      else
        this->write_tile(totals_, feature, token);
    }
    if (Config::TURNS && group_ == 0) take_turn();  // the last one passed
  }

 private:
  // ---- mainloop ----
  __device__ __forceinline__ void multiply(int tiles) {
#pragma unroll
    for (int i = 0; i < Config::TOKENS / 2; ++i) totals_[i] = 0;
    if constexpr (PROMOTE && Config::SETS == 2) {
#pragma unroll
      for (int i = 0; i < Config::PART / 2; ++i) sums_[1][i] = 0;
      scale_ = make_float2(0.f, 0.f);
    }
    open_stage();
    if constexpr (PROMOTE && Config::SETS == 1) locate_tokens();
    load_words();
    decode<0>();
    int i = 0;
    if constexpr (BUFFERS == 1) {
#pragma unroll 1
      for (; i + 1 < tiles; ++i) {
        multiply_stage<0>(i == 0, true);
        if (Config::LEAD && i > 0) let_others_start();
      }
      multiply_stage<0>(i == 0, false);
      return;
    }
#pragma unroll 1
    for (; i + 2 < tiles; i += 2) {
      multiply_stage<0>(i == 0, true);
      multiply_stage<1>(false, true);
      if (Config::LEAD) let_others_start();
    }
    if (i + 2 == tiles) {
      multiply_stage<0>(i == 0, true);
      multiply_stage<1>(false, false);
      finish<1>();
    } else {
      multiply_stage<0>(i == 0, false);
      finish<0>();
    }
  }

  __device__ __forceinline__ void let_others_start() {
    if (leads_ && lane_ == 0) ptx::mbarrier_arrive(&shared_.lead);
    leads_ = false;
  }

  // Multiply the stage whose fragments are in buffer `BUFFER`. first, more: of the tile.
  template <int BUFFER>
  __device__ __forceinline__ void multiply_stage(bool first, bool more) {
    if constexpr (PROMOTE && Config::SETS == 1)
      multiply_parts<BUFFER % BUFFERS, 0>(more);
    else if constexpr (PROMOTE)
      multiply_moves<BUFFER, 0>(first, more);
    else
      multiply_whole<BUFFER>(first, more);
  }

  // Sums of all k stay in the accumulators.
  template <int BUFFER>
  __device__ __forceinline__ void multiply_whole(bool first, bool more) {
    const int stage = stage_;
    const uint64_t tokens = ptx::swizzled_descriptor<kStageK>(shared_.ring.tokens[stage]);
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      ptx::WgmmaRegisters8bit<Config::TOKENS, Operand>::mma(totals_, fragments_[BUFFER][s],
                                                            tokens + s * (kStepK >> 4), 1);
    ptx::wgmma_commit();
    if (more) {
      open_stage();
      load_words();
    }
    ptx::wgmma_wait<1>();  // the stage before is complete
    if (!first) release(previous_);
    previous_ = stage;
    if (more) decode<BUFFER ^ 1>();
  }

  // Sums of RUN steps and of PART tokens at a time. Two sets of accumulators alternate: one is moved
  // on to the totals while the other is multiplied into.
  template <int BUFFER, int MOVE>
  __device__ __forceinline__ void multiply_moves(bool first, bool more) {
    if constexpr (MOVE < MOVES) {
      constexpr int SET = (BUFFER * MOVES + MOVE) % 2;
      constexpr int PART = MOVE % Config::PARTS;
      constexpr int RUN = MOVE / Config::PARTS;
      constexpr bool LAST = MOVE == MOVES - 1;
      const int stage = stage_;
      const uint64_t tokens = ptx::swizzled_descriptor<kStageK>(
          shared_.ring.tokens[stage] + PART * Config::PART * kStageK);
      const float2 scale = scale_of(RUN);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < Config::RUN; ++i) {
        constexpr int kFirst = RUN * Config::RUN;
        ptx::WgmmaRegisters8bit<Config::PART, Operand>::mma(
            sums_[SET], fragments_[BUFFER][kFirst + i], tokens + (kFirst + i) * (kStepK >> 4),
            i > 0);
      }
      ptx::wgmma_commit();
      if (LAST && more) {
        open_stage();
        load_words();
      }
      ptx::wgmma_wait<1>();  // the move before is complete
      if (MOVE == 0 && !first) release(previous_);
      if (MOVE == 0) previous_ = stage;
      add_to_totals<SET ^ 1, (PART + Config::PARTS - 1) % Config::PARTS>();
      scale_ = scale;
      if (LAST && more) decode<BUFFER ^ 1>();
      multiply_moves<BUFFER, MOVE + 1>(first, more);
    }
  }

  // The same with one set: it moves on as soon as it is complete. With one buffer of fragments those
  // of the next stage replace others as soon as the products that read them are complete; all but
  // the last step's behind the last product.
  template <int BUFFER, int MOVE>
  __device__ __forceinline__ void multiply_parts(bool more) {
    if constexpr (MOVE < MOVES) {
      constexpr int PART = MOVE % Config::PARTS;
      constexpr int RUN = MOVE / Config::PARTS;
      constexpr bool LAST = MOVE == MOVES - 1;
      constexpr bool REPLACE = BUFFERS == 1 && LAST;
      const int stage = stage_;
      const uint64_t tokens =
          ptx::swizzled_descriptor<kStageK>(tokens_ + (PART * Config::PART * kStageK >> 4));
      scale_ = scale_of(RUN);
      if (Config::TURNS) take_turn();
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < Config::RUN; ++i) {
        constexpr int kFirst = RUN * Config::RUN;
        ptx::WgmmaRegisters8bit<Config::PART, Operand>::mma(
            sums_[0], fragments_[BUFFER][kFirst + i], tokens + (kFirst + i) * (kStepK >> 4), i > 0);
        if (REPLACE && i == kSteps - 2) ptx::wgmma_commit();
      }
      ptx::wgmma_commit();
      if (Config::TURNS) pass_turn();
      if (LAST && more) {
        open_stage();
        locate_tokens();
        load_words();
        if (REPLACE) ptx::wgmma_wait<1>();  // all products but the last
        decode_behind_products<REPLACE ? 0 : BUFFER ^ 1, REPLACE ? kSteps - 1 : kSteps>();
      }
      ptx::wgmma_wait<0>();  // this move is complete
      if (LAST) release(stage);
      add_to_totals<0, PART>();
      if (REPLACE && more) decode_step<0>(kSteps - 1);
      if (Config::TURNS && !LAST) ptx::keep_order(warp_);  // sums move before the turn, not in it
      multiply_parts<BUFFER, MOVE + 1>(more);
    }
  }

  // Fragments of the first STEPS steps of the open stage, before the products under way are waited
  // for: left to itself the compiler decodes after that.
  template <int BUFFER, int STEPS>
  __device__ __forceinline__ void decode_behind_products() {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      decode_step<BUFFER>(s);
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::pin_registers_8bit(fragments_[BUFFER][s][i]);
    }
    ptx::keep_order(warp_);
  }

  __device__ __forceinline__ void take_turn() {
    ptx::named_sync(kTurnBarrier + group_, Config::CONSUMERS);
  }
  __device__ __forceinline__ void pass_turn() {
    ptx::named_arrive(kTurnBarrier + (group_ ^ 1), Config::CONSUMERS);
  }

  // After the last stage, which was multiply_stage<BUFFER>.
  template <int BUFFER>
  __device__ __forceinline__ void finish() {
    if constexpr (PROMOTE && Config::SETS == 1) return;
    ptx::wgmma_wait<0>();  // the last move is complete
    release(previous_);
    if constexpr (PROMOTE) {
      add_to_totals<(BUFFER * MOVES + MOVES - 1) % 2, Config::PARTS - 1>();
    } else {
#pragma unroll
      for (int i = 0; i < Config::TOKENS / 2; ++i) ptx::pin_registers_8bit(totals_[i]);
    }
  }

  // totals += scale * sums, for the tokens of one part.
  template <int SET, int PART>
  __device__ __forceinline__ void add_to_totals() {
#pragma unroll
    for (int i = 0; i < Config::PART / 2; ++i) {
      ptx::pin_registers_8bit(sums_[SET][i]);
      const float sum = static_cast<float>(sums_[SET][i]);
      Total& total = totals_[PART * (Config::PART / 2) + i];
      if constexpr (Config::GROUP > 0)
        total += (i % 4 < 2 ? scale_.x : scale_.y) * sum;
      else
        total += sum;
    }
  }

  // ---- codes ----
  // Wait for the stage at position_ and note where it lies.
  __device__ __forceinline__ void open_stage() {
    ptx::mbarrier_wait(&shared_.full[position_.stage], position_.parity);
    stage_ = position_.stage;
    position_.advance();
  }

  // The descriptor of the open stage's tokens, now and not when products are due: it takes several
  // dependent instructions.
  __device__ __forceinline__ void locate_tokens() {
    tokens_ = static_cast<uint32_t>(
        ptx::swizzled_descriptor<kStageK>(shared_.ring.tokens[stage_]));
    ptx::pin_registers_8bit(tokens_);
  }

  // Lane 0 speaks for its warp, whose warp-wide products that read the stage have completed.
  __device__ __forceinline__ void release(int stage) {
    if constexpr (Config::MULTICAST == 1) {
      if (lane_ == 0) ptx::mbarrier_arrive(&shared_.empty[stage]);
    } else {
      if (lane_ < Config::MULTICAST) ptx::mbarrier_arrive_remote(&shared_.empty[stage], lane_);
    }
  }

  // This lane's scales, zero points and 4-bit codes of the open stage.
  __device__ __forceinline__ void load_words() {
    const uint8_t* record = shared_.ring.weights[stage_][group_];
    if constexpr (FOUR_BITS) {
#pragma unroll
      for (int i = 0; i < kSteps / 2; ++i) {
        const uint4 v = load_16_bytes(record, i);
        words_[4 * i] = v.x;
        words_[4 * i + 1] = v.y;
        words_[4 * i + 2] = v.z;
        words_[4 * i + 3] = v.w;
      }
    }
#pragma unroll
    for (int row = 0; row < Config::GROUPS; ++row) {
      const uint8_t* at = record + Config::CODE_BYTES + row * Config::ROW_BYTES;
      const int pair = warp_ * 8 + lane_ / 4;
      if constexpr (Config::GROUP > 0)
        scale_words_[row] = reinterpret_cast<const uint32_t*>(at)[pair];
      if constexpr (Config::ZEROS)
        zero_pairs_[row] = reinterpret_cast<const uint16_t*>(at + Config::SCALE_BYTES)[pair];
    }
  }

  __device__ __forceinline__ uint4 load_16_bytes(const uint8_t* record, int i) const {
    return reinterpret_cast<const uint4*>(record)[(i * 4 + warp_) * kWarpSize + lane_];
  }

  // Codes of the open stage to fragments.
  template <int BUFFER>
  __device__ __forceinline__ void decode() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) decode_step<BUFFER>(s);
  }

  // The same for one k32 step.
  template <int BUFFER>
  __device__ __forceinline__ void decode_step(int s) {
    uint32_t(&fragment)[4] = fragments_[BUFFER][s];
    if constexpr (FOUR_BITS) {
      uint32_t zeros[2] = {0, 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // k16 tile
        if constexpr (Config::ZEROS) {
          const uint32_t pair = zero_pairs_[s * Config::GROUPS / kSteps];
          zeros[0] = ptx::permute_bytes(pair, 0, 0x0000);
          zeros[1] = ptx::permute_bytes(pair, 0, 0x1111);
        }
        dequant::Fragment<Weight, Operand>::rows(fragment[2 * half], fragment[2 * half + 1],
                                                 words_[2 * s + half], zeros);
      }
    } else {
      const uint4 v = load_16_bytes(shared_.ring.weights[stage_][group_], s);
      fragment[0] = v.x;
      fragment[1] = v.y;
      fragment[2] = v.z;
      fragment[3] = v.w;
    }
  }

  // Scales of rows g and g + 8 in run `run` of the stage whose words are loaded.
  __device__ __forceinline__ float2 scale_of(int run) const {
    if constexpr (Config::GROUP > 0)
      return __half22float2(*reinterpret_cast<const __half2*>(&scale_words_[run]));
    return make_float2(1.f, 1.f);
  }

  common::RingPosition<Config::STAGES> position_;
  bool leads_;        // and others have not been told to start
  int stage_ = 0;     // whose codes are being decoded or multiplied
  int previous_ = 0;  // to be released
  uint32_t tokens_;   // the lower word of their descriptor (SETS = 1)
  float2 scale_;      // of the sums under way
  uint32_t words_[FOUR_BITS ? 2 * kSteps : 1];
  uint32_t scale_words_[Config::GROUPS > 0 ? Config::GROUPS : 1];
  uint32_t zero_pairs_[Config::GROUPS > 0 ? Config::GROUPS : 1];
  uint32_t fragments_[BUFFERS][kSteps][4];
  Sum sums_[PROMOTE ? Config::SETS : 1][Config::PART / 2];
  Total totals_[Config::TOKENS / 2];
};

template <class Config>
__global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    gemm_kernel(const __grid_constant__ Problem<typename Config::Out> problem,
                const __grid_constant__ TensorMap tokens) {
  using Shared = Storage<Config>;
  static_assert(sizeof(Shared) == Config::STORAGE_BYTES,
                "the host's formula for shared memory must agree with the struct");
  Shared& shared = ptx::shared_memory<Shared>();
  const int warp = ptx::warp_uniform(threadIdx.x / kWarpSize);
  constexpr int kFeedingWarp = Config::CONSUMERS / kWarpSize;
  if (warp == kFeedingWarp && ptx::elect_one()) {
    ptx::prefetch_tensor_map(&tokens);
    for (int stage = 0; stage < Config::STAGES; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp * Config::MULTICAST);
    }
    if (Config::LEAD) ptx::mbarrier_init(&shared.lead, kWarpgroupThreads / kWarpSize);
    ptx::fence_mbarrier_init();
  }
  ptx::block_sync();
  if constexpr (Config::MULTICAST > 1) {  // others write here: their barriers must exist
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  ptx::launch_dependents();
  if (warp >= kFeedingWarp) {
    ptx::release_registers<Config::FEEDER_REGISTERS>();
    if (warp == kFeedingWarp) Feeder<Config>(problem, &tokens).run();
    if constexpr (Config::SPLIT > 1) {  // the consumers' barriers of add_cluster count everyone
      ptx::warp_sync();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  } else {
    ptx::acquire_registers<Config::CONSUMER_REGISTERS>();
    Consumer<Config>(problem).run();
  }
  if constexpr (Config::CLUSTER > 1) {  // no block may end while others use its shared memory
    ptx::warp_sync();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace sm90_8bit
