// The blocks that are kept between calls: what is kept and reused, and threads that take and give back at once, for the
// sanitizers. Returns 0 where all is well.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/memory.cpp"  // the source: what it counts is its own

using namespace rnnfast;

namespace {

constexpr size_t MB = size_t(1) << 20;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// The invariant, and that the counts are those of the blocks.
void check(size_t used) {
  size_t large = 0;
  for (int i = 0; i < kept_count; ++i) large += large_bytes(kept[i]);
  expect(large == kept_bytes, "kept bytes are not those of the kept blocks");
  expect(used == used_bytes, "used bytes are not those of the blocks in use");
  expect(used_bytes + kept_bytes <= most_used, "more is held than was ever in use");
  expect(kept_bytes <= most_kept_bytes, "more is kept than a share of the memory");
}

void reuse() {
  const Block tape = take_block(40 * MB, false), scratch = take_block(30 * MB, true);
  expect(uintptr_t(tape.data) % HUGE_PAGE == 0, "a large block does not begin with a huge page");
  std::memset(tape.data, 1, 40 * MB);
  check(70 * MB);
  give_back(scratch);
  give_back(tape);
  check(0);
  expect(kept_bytes == 70 * MB, "what was given back is not kept");
  const Block same = take_block(40 * MB, false), smaller = take_block(10 * MB, true);
  expect(same.data == tape.data && smaller.data == scratch.data, "a kept block was not taken again");
  std::memset(same.data, 2, 40 * MB);  // its pages may have been the kernel's in between
  for (size_t i = 0; i < 40 * MB; i += 4096) expect(same.data[i] == 2, "a block does not hold what is written to it");
  give_back(same);
  const Block short_tape = take_block(10 * MB, false);
  expect(short_tape.data != tape.data, "a small tape holds a block of more than its size and a half");
  check(40 * MB);
  give_back(short_tape);
  give_back(smaller);
  check(0);
}

// What is held for long ends within its last page, what is used for a call with a huge page.
void capacities() {
  const Block tape = take_block(5 * MB + 1, false), scratch = take_block(5 * MB + 1, true);
  expect(tape.capacity < 5 * MB + HUGE_PAGE / 2, "a tensor has all of a huge page that it does not fill");
  expect(scratch.capacity == 6 * MB, "the last huge page of a call's memory is not its own");
  give_back(scratch);
  give_back(tape);
  check(0);
}

void growing_and_shrinking() {
  for (int round = 0; round < 3; ++round)
    for (size_t size : {5, 9, 17, 33, 65, 80, 41, 29, 11, 6}) {
      const Block tape = take_block(size * MB, false), scratch = take_block(size * MB / 2, true);
      check(tape.capacity + large_bytes(scratch));
      give_back(tape);
      give_back(scratch);
      check(0);
    }
  expect(most_used <= (80 + 40) * MB, "reuse has made for more than the largest two blocks need");
}

#if defined(__linux__)
// Bytes of this process that the kernel may take.
size_t offered_bytes() {
  std::ifstream rollup("/proc/self/smaps_rollup");
  for (std::string name; rollup >> name;) {
    size_t kilobytes = 0;
    if (name == "LazyFree:" && rollup >> kilobytes) return kilobytes << 10;
  }
  expect(false, "the system does not tell what has been offered to it");
  return 0;
}

// A block is offered once it has been unused for a second, and not before; then it is as good as any.
void offering() {
  const Block tape = take_block(40 * MB, false), scratch = take_block(30 * MB, true);
  std::memset(tape.data, 1, 40 * MB);
  std::memset(scratch.data, 1, 30 * MB);
  give_back(tape);
  give_back(scratch);
  expect(offered_bytes() == 0, "a block that has just been used is offered");
  for (int i = 0; i < kept_count; ++i)
    if (kept[i].data == tape.data) std::rotate(kept, kept + i, kept + i + 1), kept[0].since -= std::chrono::seconds(2);
  const Block small = take_block(1, true);
  give_back(small);
  expect(offered_bytes() >= 40 * MB && offered_bytes() < 70 * MB, "not the unused block alone is offered");
  const Block again = take_block(40 * MB, false);
  expect(again.data == tape.data, "an offered block is not taken again");
  std::memset(again.data, 2, 40 * MB);
  for (size_t i = 0; i < 40 * MB; i += 4096) expect(again.data[i] == 2, "an offered block does not hold what is written to it");
  expect(offered_bytes() == 0, "a block is offered while it is in use");
  give_back(again);
  check(0);
}
#else
void offering() {}
#endif

void many() {
  std::vector<Block> blocks;
  for (int i = 0; i < 3 * MOST_KEPT; ++i) blocks.push_back(take_block(size_t(1) << (6 + i % 12), true));
  for (const Block& block : blocks) std::memset(block.data, 1, block.capacity);
  for (const Block& block : blocks) give_back(block);
  expect(kept_count == MOST_KEPT, "small blocks are not kept, or too many are");
  check(0);
}

// Each thread's blocks are its own while it has them.
void threads() {
  std::vector<std::thread> all;
  for (int thread = 0; thread < 4; ++thread)
    all.emplace_back([thread] {
      for (int round = 0; round < 300; ++round) {
        const size_t bytes = size_t(1) << (8 + (round * 7 + thread) % 16);
        const Block block = take_block(bytes, round % 2);
        for (size_t i = 0; i < bytes; i += 64) block.data[i] = char(thread);
        for (size_t i = 0; i < bytes; i += 64) expect(block.data[i] == char(thread), "two threads have the same block");
        give_back(block);
      }
    });
  for (std::thread& thread : all) thread.join();
  check(0);
}

}  // namespace

int main() {
  capacities();
  reuse();
  offering();
  growing_and_shrinking();
  many();
  threads();
  return 0;
}
