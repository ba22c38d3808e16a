// Blocks of memory that are kept from one call to the next: scratch, and tensors. Not templates, and no torch: one copy
// serves all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rnnfast {

constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t LARGE_BLOCK = size_t(4) << 20;
constexpr size_t SMALL_KEPT = size_t(64) << 20;
// From here on a tensor is worth a block: the C library may give its pages back to the system, and get new ones, in each call.
constexpr size_t WORTH_KEEPING = size_t(128) << 10;

// Asks for huge pages where a block spans some: a first touch of small pages costs more than computing what goes there.
void wish_huge_pages(void* data, size_t bytes);

struct Block {
  char* data;
  size_t capacity;
};

// A block of at least so many bytes, aligned to 64 or more, of undefined content; from any thread. Blocks of LARGE_BLOCK and
// more never make for a larger footprint than use alone: kept ones and those in use together are no more than the most that
// was ever in use at a time; of smaller ones no more than SMALL_KEPT bytes are kept. `briefly`: for the length of a call; a kept
// block much too large may then serve, and all of its last huge page is its own. Throws std::runtime_error where there is no
// memory.
Block take_block(size_t bytes, bool briefly);
// Keeps the block for the next taker; on any thread, in a forked child, and until the very end of the process.
void give_back(Block block);

// A block for the length of a call.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return block_.data; }

 private:
  Block block_;
};

// Hands out consecutive parts of a Scratch. Run once without memory to learn the size, once with.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace rnnfast
