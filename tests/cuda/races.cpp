// A race detector for emulated kernels: two accesses to the same memory by different threads, one of them a write, must
// be ordered by barriers, flags or mbarriers (happens-before, kept as vector clocks). What a launch computes does not
// matter: a missing barrier is found even where every schedule gives the right bits. The kernels are compiled with
// -fsanitize=thread, which calls the functions at the end of this file at each access, and emulator.h tells the rest.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#pragma GCC optimize("O3")  // clocks are long

namespace rnnfast::races {
namespace {

// A thread of the launch is an agent, and so are its remote stores, which are on their way while the thread goes on.
constexpr int kNobody = -1;
using Time = int;  // signed, of which SSE2 finds the maximum sooner
// Up to which time of each agent all it did has happened before.
using Clock = std::vector<Time>;

struct Access {
  int agent = kNobody;
  Time time = 0;

  bool before(const Clock& now) const { return agent == kNobody || time <= now[agent]; }
};

// The last write, and each agent's last read since.
struct Cell {
  Access write;
  std::vector<Access> reads;
};

constexpr size_t kCellBytes = 2;  // the least that kernels store

struct Memory {
  const char* name;
  size_t bytes;
  std::vector<Cell> cells;
};

int threads = 0, current = kNobody;
std::vector<Clock> clocks;                              // of each thread
std::map<std::pair<const void*, int>, Clock> released;  // of all who released the object in this phase
std::vector<Clock> sent;                                // of each remote store, until it is delivered
std::map<uintptr_t, Memory> watched;                    // by address
std::string first_race;
uint64_t accesses = 0;

void join(Clock& clock, const Clock& other) {
  if (clock.empty()) clock.resize(2 * threads);
  for (size_t agent = 0; agent < other.size(); ++agent)
    clock[agent] = std::max(clock[agent], other[agent]);
}

std::string described(bool write, int agent) {
  const char* what = agent >= threads ? "remote store" : write ? "write" : "read";
  return std::string(what) + " by thread " + std::to_string(agent % threads);
}

void check(const Access& earlier, bool earlier_write, int agent, bool write, const Clock& now, const Memory& memory,
           size_t at) {
  if (earlier.agent == agent || earlier.before(now) || !first_race.empty()) return;
  first_race = "race: " + described(earlier_write, earlier.agent) + " and " + described(write, agent) + " at byte " +
               std::to_string(at) + " of " + memory.name;
}

void touch(int agent, const Clock& now, const void* address, size_t bytes, bool write) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  auto found = watched.upper_bound(begin);
  if (found == watched.begin()) return;
  Memory& memory = std::prev(found)->second;
  const size_t first = begin - std::prev(found)->first;
  for (size_t at = first / kCellBytes * kCellBytes; at < first + bytes && at < memory.bytes; at += kCellBytes) {
    Cell& cell = memory.cells[at / kCellBytes];
    const Access access{agent, now[agent]};
    ++accesses;
    check(cell.write, true, agent, write, now, memory, at);
    if (write) {
      for (const Access& read : cell.reads) check(read, false, agent, write, now, memory, at);
      cell.reads.clear();
      cell.write = access;
      continue;
    }
    size_t mine = 0;
    while (mine < cell.reads.size() && cell.reads[mine].agent != agent) ++mine;
    if (mine == cell.reads.size()) cell.reads.emplace_back();
    cell.reads[mine] = access;
  }
}

}  // namespace

// ---- what emulator.h tells ------------------------------------------------------------------------------------------

void watch(const char* name, const void* memory, size_t bytes) {
  if (memory) watched[reinterpret_cast<uintptr_t>(memory)] = {name, bytes, std::vector<Cell>((bytes + 1) / kCellBytes)};
}

void begin(int count) {
  threads = count;
  clocks.assign(count, Clock(2 * count));
  for (int thread = 0; thread < count; ++thread) clocks[thread][thread] = 1;
}

void turn(int thread) { current = thread; }

void access(const void* address, size_t bytes, bool write) {
  // What this file itself does is nobody's: the linker may give it the instrumented copy of a template of std.
  const int thread = std::exchange(current, kNobody);
  if (thread != kNobody) touch(thread, clocks[thread], address, bytes, write);
  current = thread;
}

void release(const void* object, int phase) {
  join(released[{object, phase}], clocks[current]);
  ++clocks[current][current];
}

void acquire(const void* object, int phase) { join(clocks[current], released[{object, phase}]); }

int send(const void* target, size_t bytes) {
  Clock clock = clocks[current];
  const int stores = threads + current;
  clock[stores] = clocks[current][current]++;  // in this clock alone: only who is delivered the store has it behind them
  touch(stores, clock, target, bytes, true);
  sent.push_back(std::move(clock));
  return static_cast<int>(sent.size()) - 1;
}

void deliver(int store, const void* object, int phase) {
  join(released[{object, phase}], std::exchange(sent[store], {}));
}

std::string end() {
  current = kNobody;
  released.clear();
  sent.clear();
  watched.clear();
  return std::exchange(first_race, {});
}

}  // namespace rnnfast::races

// How many accesses have been checked since the last call.
extern "C" uint64_t rnnfast_checked_accesses() { return std::exchange(rnnfast::races::accesses, 0); }

// ---- what -fsanitize=thread calls, in place of its own library ------------------------------------------------------

#define RNNFAST_ACCESSES(bytes)                                                             \
  void __tsan_read##bytes(void* at) { rnnfast::races::access(at, bytes, false); }           \
  void __tsan_write##bytes(void* at) { rnnfast::races::access(at, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* at) { rnnfast::races::access(at, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* at) { rnnfast::races::access(at, bytes, true); }

extern "C" {
RNNFAST_ACCESSES(1)
RNNFAST_ACCESSES(2)
RNNFAST_ACCESSES(4)
RNNFAST_ACCESSES(8)
RNNFAST_ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) { rnnfast::races::access(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { rnnfast::races::access(at, bytes, true); }
// clang's, in place of the functions of that name.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  rnnfast::races::access(from, bytes, false);
  rnnfast::races::access(to, bytes, true);
  return std::memmove(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) { return __tsan_memcpy(to, from, bytes); }
void* __tsan_memset(void* to, int value, size_t bytes) {
  rnnfast::races::access(to, bytes, true);
  return std::memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of static variables.
uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
}
