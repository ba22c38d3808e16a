#include "memory.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rnnfast {
namespace {

constexpr int MOST_KEPT = 64;
using Clock = std::chrono::steady_clock;

struct KeptBlock : Block {
  Clock::time_point since;
  bool is_offered;  // to the kernel
};

// Trivially destructible, all of it: the last tensor may give its block back when static destructors have run.
std::mutex kept_mutex;  // guards what follows; held across fork, so that the child finds it whole
KeptBlock kept[MOST_KEPT];  // in the order in which they were given back
int kept_count = 0;
size_t kept_bytes = 0, used_bytes = 0, most_used = 0;  // of large blocks
size_t small_kept_bytes = 0;
static_assert(std::is_trivially_destructible_v<std::mutex> && std::is_trivially_destructible_v<KeptBlock>);

const size_t most_kept_bytes = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 16;
const int fork_handler = pthread_atfork([] { kept_mutex.lock(); }, [] { kept_mutex.unlock(); }, [] { kept_mutex.unlock(); });

size_t large_bytes(const Block& block) { return block.capacity >= LARGE_BLOCK ? block.capacity : 0; }

Block remove(int index) {
  const Block block = kept[index];
  std::copy(kept + index + 1, kept + kept_count, kept + index);
  --kept_count;
  kept_bytes -= large_bytes(block);
  small_kept_bytes -= block.capacity - large_bytes(block);
  return block;
}

// Large blocks that nobody has taken for a second: the kernel may have their pages when others need memory; those that it has left
// by the next use cost no fault. In every call that would take a few hundredths of its time. With the mutex held: a block that is
// taken meanwhile could lose what is written to it.
void offer_unused(Clock::time_point now) {
#if defined(MADV_FREE)
  for (int i = 0; i < kept_count && now - kept[i].since > std::chrono::seconds(1); ++i) {
    if (large_bytes(kept[i]) && !kept[i].is_offered) madvise(kept[i].data, kept[i].capacity, MADV_FREE);
    kept[i].is_offered = true;
  }
#else
  (void)now;
#endif
}

// Blocks that go back to the system, once the mutex is no longer held: that takes a while.
class Unwanted {
 public:
  ~Unwanted() { free(); }
  void free() {
    while (count_ > 0) std::free(blocks_[--count_].data);
  }
  void add(Block block) { blocks_[count_++] = block; }
  // Of the large ones, or of the small ones, those given back longest ago go first.
  void drop_until_kept_are(bool large, size_t bytes) {
    const size_t& now = large ? kept_bytes : small_kept_bytes;
    for (int i = 0; now > bytes;) {
      if ((large_bytes(kept[i]) > 0) == large)
        add(remove(i));
      else
        ++i;
    }
  }

 private:
  Block blocks_[MOST_KEPT + 1];
  int count_ = 0;
};

}  // namespace

void wish_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // without it all works as well
#else
  (void)data, (void)bytes;
#endif
}

Block take_block(size_t bytes, bool briefly) {
  static const size_t PAGE = size_t(sysconf(_SC_PAGESIZE));
  const size_t alignment = bytes >= (briefly ? WORTH_KEEPING : HUGE_PAGE) ? HUGE_PAGE : PAGE;
  // What is held for long takes no huge page that it does not fill.
  const size_t unit = briefly ? alignment : PAGE, capacity = std::max((bytes + unit - 1) / unit * unit, unit);
  // What is held for long may waste half of its size; small needs do not take what large ones come back for.
  const size_t most = !briefly ? capacity / 2 * 3 : capacity < LARGE_BLOCK ? LARGE_BLOCK - 1 : SIZE_MAX;
  Unwanted unwanted;
  std::lock_guard<std::mutex> lock(kept_mutex);
  int best = -1;
  for (int i = 0; i < kept_count; ++i)
    if (kept[i].capacity >= capacity && kept[i].capacity <= most && (best < 0 || kept[i].capacity < kept[best].capacity))
      best = i;
  Block block{nullptr, capacity};
  if (best >= 0) {
    block = remove(best);
  } else {
    const size_t used = used_bytes + large_bytes(block);
    unwanted.drop_until_kept_are(true, std::max(most_used, used) - used);
    void* data = nullptr;
    bool failed = posix_memalign(&data, alignment, capacity);
    if (failed) {  // where memory is short, what is kept is not worth having
      unwanted.drop_until_kept_are(true, 0);
      unwanted.drop_until_kept_are(false, 0);
      unwanted.free();
      failed = posix_memalign(&data, alignment, capacity);
    }
    if (failed)
      throw std::runtime_error("no memory for a block of " + std::to_string(capacity) + " bytes");
    block.data = static_cast<char*>(data);
    wish_huge_pages(block.data, capacity);
  }
  used_bytes += large_bytes(block);
  most_used = std::max(most_used, used_bytes);
  return block;
}

Scratch::Scratch(size_t bytes) : block_(take_block(bytes, true)) {}
Scratch::~Scratch() { give_back(block_); }

void give_back(Block block) {
  const Clock::time_point now = Clock::now();
  Unwanted unwanted;
  std::lock_guard<std::mutex> lock(kept_mutex);
  used_bytes -= large_bytes(block);
  if (large_bytes(block) > most_kept_bytes) return unwanted.add(block);
  const size_t small_bytes = block.capacity - large_bytes(block);
  unwanted.drop_until_kept_are(true, most_kept_bytes - large_bytes(block));
  unwanted.drop_until_kept_are(false, SMALL_KEPT - small_bytes);
  if (kept_count == MOST_KEPT) unwanted.add(remove(0));
  kept[kept_count++] = {block, now, false};
  kept_bytes += large_bytes(block);
  small_kept_bytes += small_bytes;
  offer_unused(now);
}

}  // namespace rnnfast
