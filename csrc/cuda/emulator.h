// The host version of hardware.h. Every thread of a launch is a fiber; fibers run in an order shuffled anew each round
// and are switched at barriers, waits and warp-wide instructions. Shared memory starts as NaN, remote stores and copies
// arrive late, so a missing barrier shows as a wrong number, and a wait that nothing ends as an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define RNNFAST_DEVICE inline
#define RNNFAST_KERNEL(threads) void

// What the race detector of tests/cuda/races.cpp is told; where it is not built in, these functions do nothing.
#ifdef RNNFAST_RACES
#define RNNFAST_TELL(type, what) type what;
#else
#define RNNFAST_TELL(type, what) \
  inline type what { return type(); }
#endif

// Before a function that is one atomic operation, whose own accesses are no race.
#define RNNFAST_ATOMIC __attribute__((no_sanitize("thread")))

namespace rnnfast::races {

// Has the accesses of so many bytes checked until the launch ends; null is none.
RNNFAST_TELL(void, watch(const char* /*name*/, const void*, size_t))
RNNFAST_TELL(void, begin(int /*threads*/))
// Which thread runs from here on; -1: the emulator itself.
RNNFAST_TELL(void, turn(int /*thread*/))
// One that the compiler's instrumentation does not show.
RNNFAST_TELL(void, access(const void*, size_t, bool /*write*/))
// What a thread did before it released an object happens before what another does after acquiring it in the same phase.
RNNFAST_TELL(void, release(const void* /*object*/, int /*phase*/))
RNNFAST_TELL(void, acquire(const void* /*object*/, int /*phase*/))
// A store that may happen at any time until it is delivered, which releases the object. Returns its number.
RNNFAST_TELL(int, send(const void* /*target*/, size_t))
RNNFAST_TELL(void, deliver(int /*store*/, const void* /*object*/, int /*phase*/))
// The first race of the launch in words; empty: none.
RNNFAST_TELL(std::string, end())

}  // namespace rnnfast::races

namespace rnnfast::emulator {

constexpr size_t kStackBytes = 32 << 10;
constexpr int kWarp = 32;
// A round in which no thread gets further counts as a second, so that a kernel's own watchdog can find it out first.
constexpr int kIdleRounds = 1000;
constexpr int kMostBytes = (1 << 20) - 1;  // that an mbarrier may wait for, or be ahead by

enum class WarpWide { none, shuffle, keep, barrier, mma };

// What a warp's lanes lay down for one another. Two sets, used in turn: a lane may run one instruction ahead.
struct Warp {
  uint64_t values[2][kWarp][6];
  WarpWide instruction[2] = {};
  int arrived = 0, generation = 0;
};

struct Block {
  int x, y, z, first_of_cluster;
  bool has_published = false;  // its mbarriers to the cluster
  std::vector<char> shared;
  std::vector<Warp> warps;
  int arrived = 0, generation = 0;
};

// An asynchronous copy.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  Block* block;
  int thread;
  std::vector<Copy> copies;  // not yet made
  ucontext_t context;
  jmp_buf resume;
  char* stack;
  bool started = false, finished = false;
};

struct RemoteStore {
  char* target;
  uint64_t* barrier;
  uint32_t value;
  int number;
};

// An mbarrier as the emulator keeps it in its 8 bytes.
struct Mbarrier {
  int16_t arrivals, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Mbarrier) == 8);

struct Launch {
  int blocks_x, blocks_y, blocks_z, threads, cluster;
  size_t shared_bytes;
};

struct Machine {
  Launch launch;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<RemoteStore> in_flight;
  std::vector<int> cluster_arrived, cluster_generation;
  std::mt19937 random;
  std::function<void()> kernel;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t home;
  uint64_t progress = 0, nanoseconds = 0;
  std::string failure;
};

inline Machine*& machine() {
  static thread_local Machine* instance = nullptr;
  return instance;
}
inline unsigned& schedule() {
  static unsigned seed = 0;
  return seed;
}

// The i-th stack; kept from one launch to the next.
inline char* stack(size_t i) {
  static thread_local std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= i) stacks.emplace_back(new char[kStackBytes]);
  return stacks[i].get();
}

// Gives the turn away.
inline void yield() {
  Fiber* self = machine()->current;
  if (!_setjmp(self->resume)) _longjmp(machine()->scheduler, 1);
}

inline void run_fiber() {
  machine()->kernel();
  machine()->current->finished = true;
  ++machine()->progress;
  _longjmp(machine()->scheduler, 1);
}

RNNFAST_ATOMIC inline void complete(Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.arrivals;
  }
}

inline void deliver(Machine& m, bool all) {
  std::shuffle(m.in_flight.begin(), m.in_flight.end(), m.random);
  size_t count = all ? m.in_flight.size() : m.random() % (m.in_flight.size() + 1);
  for (; count; --count, ++m.progress) {
    const RemoteStore store = m.in_flight.back();
    m.in_flight.pop_back();
    std::memcpy(store.target, &store.value, 4);
    auto& barrier = *reinterpret_cast<Mbarrier*>(store.barrier);
    races::deliver(store.number, store.barrier, barrier.phase);
    barrier.bytes -= 4;
    if (barrier.bytes < -kMostBytes) m.failure = "more bytes came to an mbarrier than it can count";
    complete(barrier);
  }
}

// Runs the kernel on every thread of the grid, all blocks at once; throws where it fails or can never end.
inline void run(const Launch& launch, std::function<void()> kernel) {
  Machine m;
  m.launch = launch;
  m.kernel = std::move(kernel);
  m.random.seed(schedule());
  const int blocks = launch.blocks_x * launch.blocks_y * launch.blocks_z;
  m.blocks.resize(blocks);
  m.fibers.resize(static_cast<size_t>(blocks) * launch.threads);
  m.cluster_arrived.assign(blocks, 0);
  m.cluster_generation.assign(blocks, 0);
  races::begin(static_cast<int>(m.fibers.size()));
  for (int b = 0; b < blocks; ++b) {
    Block& block = m.blocks[b];
    block.x = b % launch.blocks_x;
    block.y = b / launch.blocks_x % launch.blocks_y;
    block.z = b / (launch.blocks_x * launch.blocks_y);
    block.first_of_cluster = b - block.x % launch.cluster;
    block.shared.assign(launch.shared_bytes, static_cast<char>(0xff));
    races::watch("shared memory", block.shared.data(), launch.shared_bytes);
    block.warps.resize((launch.threads + kWarp - 1) / kWarp);
    for (int t = 0; t < launch.threads; ++t) {
      Fiber& fiber = m.fibers[static_cast<size_t>(b) * launch.threads + t];
      fiber.block = &block;
      fiber.thread = t;
      fiber.stack = stack(&fiber - m.fibers.data());
    }
  }
  machine() = &m;
  std::vector<Fiber*> order;
  for (Fiber& fiber : m.fibers) order.push_back(&fiber);
  int idle_rounds = 0;
  while (!order.empty() && m.failure.empty() && idle_rounds < kIdleRounds) {
    const uint64_t before = m.progress;
    std::shuffle(order.begin(), order.end(), m.random);
    for (Fiber* fiber : order) {
      m.current = fiber;
      races::turn(static_cast<int>(fiber - m.fibers.data()));
      if (!_setjmp(m.scheduler)) {
        if (fiber->started) _longjmp(fiber->resume, 1);
        fiber->started = true;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack;
        fiber->context.uc_stack.ss_size = kStackBytes;
        fiber->context.uc_link = &m.home;
        makecontext(&fiber->context, &run_fiber, 0);
        setcontext(&fiber->context);
      }
    }
    races::turn(-1);
    if (!m.in_flight.empty()) deliver(m, idle_rounds > 0);
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->finished; }), order.end());
    idle_rounds = m.progress == before ? idle_rounds + 1 : 0;
    if (idle_rounds) m.nanoseconds += 1'000'000'000;
  }
  machine() = nullptr;
  if (const std::string race = races::end(); !race.empty()) throw std::runtime_error(race);
  if (!m.failure.empty()) throw std::runtime_error(m.failure);
  if (!order.empty()) throw std::runtime_error("deadlock: threads wait for what nothing will do");
}

// All `count` parties of a barrier meet. Two phases are enough to keep what they did apart: all have left the last but one.
inline void meet(int& arrived, int& generation, int count, bool orders_memory = true) {
  const int mine = generation;
  if (orders_memory) races::release(&generation, mine & 1);
  ++machine()->progress;
  if (++arrived == count) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) yield();
  if (orders_memory) races::acquire(&generation, mine & 1);
}

// Lays values down for the warp and returns the place where all lanes' values lie until the next but one call. All lanes must be at
// the same instruction.
template <class Write>
inline uint64_t (*exchange(WarpWide instruction, Write write))[6] {
  Fiber* self = machine()->current;
  Warp& warp = self->block->warps[self->thread / kWarp];
  auto* values = warp.values[warp.generation & 1];
  WarpWide& of_all = warp.instruction[warp.generation & 1];
  if (warp.arrived == 0) of_all = instruction;
  if (of_all != instruction) machine()->failure = "the lanes of a warp are at different warp-wide instructions";
  write(values[self->thread % kWarp]);
  // Of mma and keep(), nothing says that they order memory; that a shuffle does is more than CUDA promises.
  meet(warp.arrived, warp.generation, kWarp, instruction == WarpWide::shuffle || instruction == WarpWide::barrier);
  return values;
}

}  // namespace rnnfast::emulator

namespace rnnfast::hw {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

struct alignas(16) Vec16 {
  uint32_t word[4];
};

inline int thread() { return emulator::machine()->current->thread; }
inline int threads() { return emulator::machine()->launch.threads; }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }
inline int block_x() { return emulator::machine()->current->block->x; }
inline int block_y() { return emulator::machine()->current->block->y; }
inline int block_z() { return emulator::machine()->current->block->z; }
inline int blocks_x() { return emulator::machine()->launch.blocks_x; }
inline int blocks_y() { return emulator::machine()->launch.blocks_y; }
inline char* shared_memory() { return emulator::machine()->current->block->shared.data(); }

inline void block_barrier() {
  emulator::Block& block = *emulator::machine()->current->block;
  emulator::meet(block.arrived, block.generation, threads());
}

inline void warp_barrier() {
  emulator::exchange(emulator::WarpWide::barrier, [](uint64_t*) {});
}

template <class V>
V shuffle_xor(V value, int mask) {
  static_assert(sizeof(V) <= 8);
  auto* lanes =
      emulator::exchange(emulator::WarpWide::shuffle, [&](uint64_t* mine) { std::memcpy(mine, &value, sizeof(V)); });
  V other;
  std::memcpy(&other, lanes[lane() ^ mask], sizeof(V));
  return other;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(float16 x) { return static_cast<float>(x); }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, bfloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, float16& out) { out = static_cast<float16>(x); }

inline float round_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == x) bits += 0x1000;
  bits &= ~0x1fffu;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Functions {
  template <class V>
  static V sigmoid(V x) { return 1 / (1 + std::exp(-x)); }
  template <class V>
  static V tanh(V x) { return std::tanh(x); }
};

// d (16 x 8) += a (16 x K) b (K x 8), where a 32-bit register holds PACK neighbours along K and K is 8 PACK.
template <class Unpack>
void emulate_mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1, int pack, Unpack unpack) {
  const auto write = [&](uint64_t* mine) {
    std::copy(a, a + 4, mine);
    mine[4] = b0;
    mine[5] = b1;
  };
  auto* lanes = emulator::exchange(emulator::WarpWide::mma, write);
  const int group = lane() / 4, quad = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group, column = 2 * quad + (i & 1);
    for (int high = 0; high < 2; ++high)
      for (int q = 0; q < 4; ++q)
        for (int e = 0; e < pack; ++e)
          d[i] += unpack(static_cast<uint32_t>(lanes[row * 4 + q][2 * high + i / 2]), e) *
                  unpack(static_cast<uint32_t>(lanes[column * 4 + q][4 + high]), e);
  }
}

struct MmaBf16 {
  static void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    emulate_mma(d, a, b0, b1, 2, [](uint32_t word, int e) {
      return widen(bfloat16{static_cast<uint16_t>(word >> 16 * e)});
    });
  }
};
struct MmaF16 {
  static void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    emulate_mma(d, a, b0, b1, 2, [](uint32_t word, int e) {
      const uint16_t bits = static_cast<uint16_t>(word >> 16 * e);
      float16 half;
      std::memcpy(&half, &bits, 2);
      return widen(half);
    });
  }
};
struct MmaTf32 {
  static void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    emulate_mma(d, a, b0, b1, 1, [](uint32_t word, int) {
      word &= ~0x1fffu;
      float out;
      std::memcpy(&out, &word, 4);
      return out;
    });
  }
};

inline Vec16 load_vector(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::machine()->failure = "misaligned vector load";
  return *static_cast<const Vec16*>(from);
}

template <class Word>
void hold(Word&) {}
template <class Word>
void keep(Word&) {
  emulator::exchange(emulator::WarpWide::keep, [](uint64_t*) {});
}

using Address = uint32_t;
inline Address address(const void* shared) { return static_cast<Address>(static_cast<const char*>(shared) - shared_memory()); }
template <class Value>
const Value* at(Address address) {
  static const Value none{};
  if (size_t{address} + sizeof(Value) <= emulator::machine()->current->block->shared.size())
    return reinterpret_cast<const Value*>(shared_memory() + address);
  emulator::machine()->failure = "a load from beyond the shared memory";
  return &none;
}
inline Vec16 load_shared(Address from) {
  if (size_t{from} + 16 <= emulator::machine()->current->block->shared.size()) return load_vector(shared_memory() + from);
  emulator::machine()->failure = "a load from beyond the shared memory";
  return {};
}

// In one piece, which the race detector sees.
inline void copy(const emulator::Copy& copy) {
  if (copy.bytes == 16)
    *static_cast<Vec16*>(copy.to) = *static_cast<const Vec16*>(copy.from);
  else if (copy.bytes == 8)
    *static_cast<uint64_t*>(copy.to) = *static_cast<const uint64_t*>(copy.from);
  else
    *static_cast<uint32_t*>(copy.to) = *static_cast<const uint32_t*>(copy.from);
}
// At once, or not before they are waited for.
inline void copy_async(Address shared, const void* global, size_t bytes) {
  emulator::Machine& m = *emulator::machine();
  if (size_t{shared} + bytes > m.current->block->shared.size())
    m.failure = "a copy beyond the shared memory";
  else if (shared % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    m.failure = "misaligned async copy";
  else if (m.random() % 2)
    copy({shared_memory() + shared, global, bytes});
  else
    m.current->copies.push_back({shared_memory() + shared, global, bytes});
}
inline void copy_async(void* shared, const void* global) { copy_async(address(shared), global, 16); }
template <class Value>
void copy_async(Address shared, const Value* global) { copy_async(shared, global, sizeof(Value)); }
inline void copies_wait() {
  for (const emulator::Copy& each : emulator::machine()->current->copies) copy(each);
  emulator::machine()->current->copies.clear();
}

inline void flag_release(uint32_t* flag, uint32_t value) {
  races::release(flag, 0);
  *flag = value;
  ++emulator::machine()->progress;
}
inline uint32_t flag_acquire(const uint32_t* flag) {
  emulator::yield();
  races::acquire(flag, 0);
  return *flag;
}
inline uint32_t clock_high() { return static_cast<uint32_t>(emulator::machine()->nanoseconds >> 31); }
inline void fail(const char* message, int64_t which) {
  emulator::machine()->failure = std::string(message) + ": " + std::to_string(which);
  for (;;) emulator::yield();  // the scheduler ends the launch
}

inline void cluster_barrier() {
  emulator::Machine& m = *emulator::machine();
  const int first = m.current->block->first_of_cluster;
  emulator::meet(m.cluster_arrived[first], m.cluster_generation[first], m.launch.cluster * m.launch.threads);
}
inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  auto& b = *reinterpret_cast<emulator::Mbarrier*>(barrier);
  b.arrivals = b.pending = static_cast<int16_t>(arrivals);
  b.bytes = 0;
  b.phase = 0;
}
inline void mbarrier_publish() { emulator::machine()->current->block->has_published = true; }
// Operations do not race with one another, but with the initialisation: each counts as a read.
RNNFAST_ATOMIC inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  auto& b = *reinterpret_cast<emulator::Mbarrier*>(barrier);
  races::access(barrier, 8, false);
  races::release(barrier, b.phase);
  --b.pending;
  b.bytes += bytes;
  if (b.pending < 0) emulator::machine()->failure = "an mbarrier's phase has more arrivals than it waits for";
  if (b.bytes > emulator::kMostBytes) emulator::machine()->failure = "an mbarrier is to wait for more bytes than it can count";
  emulator::complete(b);
  ++emulator::machine()->progress;
}
RNNFAST_ATOMIC inline bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  const auto& b = *reinterpret_cast<emulator::Mbarrier*>(barrier);
  races::access(barrier, 8, false);
  if (static_cast<int>(b.phase) == parity) {
    emulator::yield();
    return false;
  }
  races::acquire(barrier, parity);
  ++emulator::machine()->progress;
  return true;
}
inline void remote_store(Address local, uint64_t* barrier, int rank, uint32_t value) {
  emulator::Machine& m = *emulator::machine();
  if (rank < 0 || rank >= m.launch.cluster) return fail("a remote store to a block that the cluster has not", rank);
  emulator::Block& peer = m.blocks[m.current->block->first_of_cluster + rank];
  char* there = peer.shared.data();
  if (!peer.has_published) m.failure = "a remote store to a block that has published no mbarrier";
  if (local % 4 || address(barrier) % 8) m.failure = "misaligned remote store";
  if (size_t{local} + 4 > peer.shared.size()) return fail("a remote store beyond the shared memory", local);
  auto* its_barrier = reinterpret_cast<uint64_t*>(there + address(barrier));
  races::access(its_barrier, 8, false);
  m.in_flight.push_back({there + local, its_barrier, value, races::send(there + local, 4)});
}

}  // namespace rnnfast::hw
