// CUDA kernels on the CPU (x86-64, g++): one fiber per CUDA thread, all blocks of the grid alive at
// once.
//
// What makes it a test and not only a simulator:
//   - fibers run in an order drawn from a seed; a warp may run far ahead of the others ("bursts");
//   - asynchronous operations take effect as late as the program itself allows, at once, or at a
//     random moment between, again by seed: late landing exposes a missing wait, early landing a
//     missing barrier;
//   - shared memory starts as NaN; barriers that never complete are reported as a deadlock.
// It knows nothing of speed, bank conflicts, registers, or the memory model's proxies.
// Build with -fno-strict-aliasing.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emu {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;
constexpr long kIdleRounds = 200000;  // rounds of pure spinning before the run is given up

enum Status { kFinished = 0, kDeadlock = 1, kEndless = 2, kViolation = 3 };
enum class Landing { kLate, kEarly, kRandom };

// A cp.async under way: its completion only its own thread observes.
struct Copy {
  void* target;
  const void* source;
  int bytes, zeros;
};

// A bulk copy under way, completing on an mbarrier.
struct Transfer {
  std::function<void()> land;
  int bytes;
  uint64_t* barrier;
};

// Operands of one warp-wide instruction: slots alternate, so that a fast lane may enter the next
// instruction while slow lanes still read the results of this one.
struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  alignas(16) uint32_t in[2][kWarp][12];
  alignas(16) uint32_t out[2][kWarp][8];
  const void* address[2][kWarp];
};

struct NamedBarrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Block;

// One asynchronous warpgroup instruction. It runs at some moment between the last thread's issue
// and the first wait for it: accumulators change only then, and only then is shared memory read.
struct GroupOperation {
  int issued = 0;  // threads
  float* accumulators[128];
  uint32_t fragments[128][4];
  std::function<void(GroupOperation&)> execute;
};

struct Warpgroup {
  std::deque<GroupOperation> operations;
  unsigned ready = 0;     // operations that all threads have issued
  unsigned executed = 0;  // of them
};

struct Block {
  dim3 index;
  int number = 0;  // x fastest
  int threads = 0;
  int alive = 0;  // threads that have not returned
  NamedBarrier barriers[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  char* shared = nullptr;
  int cluster = 0;
};

struct Cluster {
  int arrived = 0;
  int alive = 0;  // threads that have not returned
  unsigned generation = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 thread;
  Block* block = nullptr;
  bool done = false;
  bool spinning = false;                // waits for something that only memory tells
  const unsigned* generation = nullptr; // blocked while *generation == blocked_at
  unsigned blocked_at = 0;
  const uint64_t* mbarrier = nullptr;   // blocked while its phase parity == blocked_at
  std::vector<std::vector<Copy>> groups;  // cp.async, committed
  std::vector<Copy> current;              // cp.async, not yet committed
  std::deque<unsigned> group_ends;        // wgmma: operations issued up to each commit
  unsigned issued = 0;                    // wgmma operations issued by this thread
  unsigned cluster_phase = 0;
};

struct State {
  Fiber* fiber = nullptr;
  void* scheduler = nullptr;
  dim3 grid, block;
  int cluster_size = 1;
  size_t shared_bytes = 0;
  std::function<void()> body;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  std::vector<Transfer> in_flight;
  std::mt19937 random;
  Landing landing = Landing::kLate;
  std::string violation;
};
inline State S;

inline void fail(const std::string& what) {
  if (S.violation.empty()) S.violation = what;
}
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

extern "C" void emu_switch(void** from, void* to);
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret)");

inline void suspend() { emu_switch(&S.fiber->stack_pointer, S.scheduler); }

// Give other threads a turn, for loops that poll memory.
inline void yield() {
  S.fiber->spinning = true;
  suspend();
  S.fiber->spinning = false;
}

inline void block_on(const unsigned* generation, unsigned value) {
  Fiber* self = S.fiber;
  self->generation = generation;
  self->blocked_at = value;
  while (*generation == value) suspend();
  self->generation = nullptr;
}

inline int lane() { return S.fiber->thread.x % kWarp; }
inline Warp& warp() { return S.fiber->block->warps[S.fiber->thread.x / kWarp]; }
inline bool chance(unsigned of) { return S.random() % of == 0; }

// One warp-wide instruction: `put` stores this lane's operands into slot s, the last lane to come
// runs `compute` for all. Returns the slot with the results.
template <class Put, class Compute>
inline int collective(Put put, Compute compute) {
  Warp& w = warp();
  const unsigned generation = w.generation;
  const int slot = generation & 1;
  put(w, slot);
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    compute(w, slot);
    w.generation++;
  } else {
    block_on(&w.generation, generation);
  }
  return slot;
}

inline void barrier(int id, int threads) {
  NamedBarrier& b = S.fiber->block->barriers[id];
  const unsigned generation = b.generation;
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.generation++;
  } else {
    require(b.arrived < threads, "barrier with different thread counts");
    block_on(&b.generation, generation);
  }
}
inline void barrier_arrive(int id, int threads) {
  NamedBarrier& b = S.fiber->block->barriers[id];
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.generation++;
  }
}

// ---- copies ----
inline void land(const Copy& c) {
  memcpy(c.target, c.source, c.bytes);
  memset(static_cast<char*>(c.target) + c.bytes, 0, c.zeros);
}

inline void check_shared(const void* pointer, size_t bytes) {
  const char* p = static_cast<const char*>(pointer);
  bool inside = false;
  for (const Block& b : S.blocks)
    if (b.cluster == S.fiber->block->cluster)
      inside |= p >= b.shared && p + bytes <= b.shared + S.shared_bytes;
  require(inside, "address outside of shared memory");
}

inline void start_copy(const Copy& c) {
  const int size = c.bytes + c.zeros;
  require(reinterpret_cast<uintptr_t>(c.target) % size == 0, "cp.async: target alignment");
  require(reinterpret_cast<uintptr_t>(c.source) % size == 0, "cp.async: source alignment");
  check_shared(c.target, size);
  const bool now = S.landing == Landing::kEarly || (S.landing == Landing::kRandom && chance(2));
  if (now)
    land(c);
  else
    S.fiber->current.push_back(c);
}
inline void commit_copies() {
  S.fiber->groups.push_back(std::move(S.fiber->current));
  S.fiber->current.clear();
}
inline void wait_copies(int pending) {
  auto& groups = S.fiber->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& c : groups.front()) land(c);
    groups.erase(groups.begin());
  }
}

// ---- mbarriers ----
// The 64 bits of a barrier: phase parity, arrivals per phase, arrivals and bytes still missing.
struct MBarrier {
  uint32_t phase : 1, expected : 15, pending : 16;
  int32_t bytes;
};
static_assert(sizeof(MBarrier) == 8, "an mbarrier is 64 bits");

inline MBarrier& mbarrier(uint64_t* b) {
  MBarrier& m = *reinterpret_cast<MBarrier*>(b);
  check_shared(b, 8);
  require(m.expected != 0x7fff && m.expected != 0, "mbarrier used before its initialisation");
  return m;
}
inline void mbarrier_update(MBarrier& m) {
  if (m.pending == 0 && m.bytes == 0) {
    m.phase ^= 1;
    m.pending = m.expected;
  }
}
inline void mbarrier_arrive(uint64_t* b, uint32_t bytes) {
  MBarrier& m = mbarrier(b);
  require(m.pending > 0, "mbarrier: more arrivals than expected");
  m.bytes += bytes;
  m.pending--;
  mbarrier_update(m);
}
inline void mbarrier_wait(uint64_t* b, uint32_t parity) {
  MBarrier& m = mbarrier(b);
  if (m.phase != parity) {
    return;
  }
  Fiber* self = S.fiber;
  self->mbarrier = b;
  self->blocked_at = parity;
  while (m.phase == parity) suspend();
  self->mbarrier = nullptr;
}

inline void complete(const Transfer& t) {
  t.land();
  MBarrier& m = *reinterpret_cast<MBarrier*>(t.barrier);
  m.bytes -= t.bytes;
  mbarrier_update(m);
}
inline void start_transfer(const Transfer& t) {
  mbarrier(t.barrier);
  const bool now = S.landing == Landing::kEarly || (S.landing == Landing::kRandom && chance(2));
  if (now)
    complete(t);
  else
    S.in_flight.push_back(t);
}
inline void complete_one_in_flight() {
  const size_t i = S.landing == Landing::kRandom ? S.random() % S.in_flight.size() : 0;
  const Transfer t = S.in_flight[i];
  S.in_flight.erase(S.in_flight.begin() + i);
  complete(t);
}

// ---- warpgroup instructions ----
inline Warpgroup& warpgroup() { return S.fiber->block->warpgroups[S.fiber->thread.x / 128]; }
inline void execute_until(Warpgroup& w, unsigned count) {
  for (; w.executed < count; w.executed++) {
    GroupOperation& op = w.operations[w.executed];
    op.execute(op);
    op.execute = nullptr;
  }
}
inline void issue(float* accumulators, const uint32_t (&fragment)[4],
                  std::function<void(GroupOperation&)> execute) {
  Warpgroup& w = warpgroup();
  const unsigned number = S.fiber->issued++;
  if (w.operations.size() <= number) w.operations.resize(number + 1);
  GroupOperation& op = w.operations[number];
  const int thread = S.fiber->thread.x % 128;
  op.accumulators[thread] = accumulators;
  memcpy(op.fragments[thread], fragment, 16);
  op.execute = execute;
  if (++op.issued == 128) {
    w.ready++;
    if (S.landing == Landing::kEarly || (S.landing == Landing::kRandom && chance(2)))
      execute_until(w, w.ready);
  }
}
inline void commit_group() { S.fiber->group_ends.push_back(S.fiber->issued); }
inline void wait_groups(int pending) {
  Warpgroup& w = warpgroup();
  auto& ends = S.fiber->group_ends;
  while (static_cast<int>(ends.size()) > pending) {
    const unsigned needed = ends.front();
    while (w.ready < needed) block_on(&w.ready, w.ready);
    execute_until(w, needed);
    ends.pop_front();
  }
}

// ---- clusters ----
inline Cluster& cluster() { return S.clusters[S.fiber->block->cluster]; }
inline uint32_t cluster_rank() { return S.fiber->block->number % S.cluster_size; }
inline void cluster_update(Cluster& c) {
  if (c.arrived > 0 && c.arrived == c.alive) {
    c.arrived = 0;
    c.generation++;
  }
}
inline void cluster_arrive() {
  Cluster& c = cluster();
  S.fiber->cluster_phase = c.generation;
  c.arrived++;
  cluster_update(c);
}
inline void cluster_wait() {
  Cluster& c = cluster();
  if (c.generation == S.fiber->cluster_phase) block_on(&c.generation, S.fiber->cluster_phase);
}
// The same offset in the shared memory of block `rank` of this cluster.
inline void* remote(const void* local, uint32_t rank) {
  Block& own = *S.fiber->block;
  Block& other = S.blocks[own.cluster * S.cluster_size + rank];
  return other.shared + (static_cast<const char*>(local) - own.shared);
}

// ---- scheduler ----
inline bool blocked(const Fiber& f) {
  if (f.generation) return *f.generation == f.blocked_at;
  if (f.mbarrier) return reinterpret_cast<const MBarrier*>(f.mbarrier)->phase == f.blocked_at;
  return false;
}

extern "C" inline void emu_entry() {
  S.body();
  S.fiber->done = true;
  cluster().alive--;  // those who have returned are not waited for
  cluster_update(cluster());
  // The shared memory of a block that has ended belongs to others.
  if (--S.fiber->block->alive == 0) memset(S.fiber->block->shared, 0xff, S.shared_bytes);
  for (;;) suspend();
}

struct Stacks {  // kept between launches: mapping them anew costs more than most tests
  std::vector<char*> all;
  char* get(size_t i) {
    while (all.size() <= i)
      all.push_back(static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
    return all[i];
  }
};
inline Stacks stacks;

inline void make_blocks(std::vector<Fiber>& fibers) {
  const int blocks = S.grid.x * S.grid.y, threads = S.block.x;
  S.blocks.assign(blocks, Block());
  S.clusters.assign((blocks + S.cluster_size - 1) / S.cluster_size, Cluster());
  fibers.resize(size_t(blocks) * threads);
  const size_t bytes = (S.shared_bytes + 1023) / 1024 * 1024;
  for (int b = 0; b < blocks; b++) {
    Block& block = S.blocks[b];
    block.index = {b % S.grid.x, b / S.grid.x, 0};
    block.number = b;
    block.threads = block.alive = threads;
    block.warps.resize(threads / kWarp);
    block.warpgroups.resize((threads + 127) / 128);
    block.shared = static_cast<char*>(aligned_alloc(1024, bytes ? bytes : 1024));
    block.cluster = b / S.cluster_size;
    S.clusters[block.cluster].alive += threads;
    memset(block.shared, 0xff, bytes);
    for (int t = 0; t < threads; t++) {
      Fiber& f = fibers[size_t(b) * threads + t];
      f.block = &block;
      f.thread = {unsigned(t), 0, 0};
      f.stack = stacks.get(size_t(b) * threads + t);
      void** top = reinterpret_cast<void**>(f.stack + kStackBytes);
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(emu_entry);
      for (int i = 0; i < 6; i++) *--top = nullptr;
      f.stack_pointer = top;
    }
  }
}

// Runs every fiber of warp `w` that can run once; returns how many ran, and counts those that only
// poll.
inline int run_warp(std::vector<Fiber>& fibers, size_t w, size_t& finished, int& polls) {
  const unsigned turn = S.random();
  int ran = 0;
  for (int i = 0; i < kWarp; i++) {
    Fiber& f = fibers[w * kWarp + (i ^ (turn % kWarp))];
    if (f.done || blocked(f)) continue;
    S.fiber = &f;
    emu_switch(&S.scheduler, f.stack_pointer);
    ran++;
    polls += f.spinning;
    finished += f.done;
  }
  return ran;
}

inline int schedule(std::vector<Fiber>& fibers) {
  const size_t warps = fibers.size() / kWarp;
  std::vector<size_t> order(warps);
  for (size_t i = 0; i < warps; i++) order[i] = i;
  size_t finished = 0;
  long idle = 0;
  while (finished < fibers.size()) {
    for (size_t i = warps; i > 1; i--) std::swap(order[i - 1], order[S.random() % i]);
    int ran = 0, polls = 0;
    for (size_t w : order) {
      // Now and then a warp sits out a round, or runs until it blocks.
      if (chance(4) && ran > 0) continue;
      const long burst = chance(4) ? 1L << 20 : 1;
      for (long b = 0; b < burst; b++) {
        const int polls_before = polls;
        const int now = run_warp(fibers, w, finished, polls);
        ran += now;
        if (now == 0 || polls > polls_before) break;
      }
      if (!S.violation.empty()) return kViolation;
    }
    if (!S.in_flight.empty() && (ran == polls || (S.landing == Landing::kRandom && chance(4)))) {
      complete_one_in_flight();
      idle = 0;
    } else if (ran == 0) {
      return kDeadlock;
    } else {
      idle = ran == polls ? idle + 1 : 0;
      if (idle > kIdleRounds) return kEndless;
    }
  }
  return kFinished;
}

// Runs `body` once per thread of the grid; returns a Status. Order and landing follow from `seed`.
inline int launch(dim3 grid, dim3 block, size_t shared_bytes, int cluster_size, unsigned seed,
                  std::function<void()> body) {
  S.grid = grid;
  S.block = block;
  S.shared_bytes = shared_bytes;
  S.cluster_size = cluster_size;
  S.body = body;
  S.random.seed(seed);
  S.landing = static_cast<Landing>(seed % 3);
  S.violation.clear();
  S.in_flight.clear();
  std::vector<Fiber> fibers;
  make_blocks(fibers);
  const int status = schedule(fibers);
  for (Block& b : S.blocks) free(b.shared);
  if (status == kFinished && !S.in_flight.empty()) S.violation = "copies under way at exit";
  return S.violation.empty() ? status : static_cast<int>(kViolation);
}

}  // namespace emu
