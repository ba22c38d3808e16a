#include "weight_samples.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tensors.h"

namespace rnnfast {
namespace {

constexpr int64_t WHOLE = 4096;  // bytes of a matrix that is compared whole: that takes no longer than a larger one's sample

// Elements of a weight, in runs through one gate each: unit by unit and column by column, so that they are one stride apart.
struct Run {
  int64_t first, count;
};

// Followed in memory by its runs, and by what its elements held. One without runs has all elements.
struct Sample {
  const char* data;
  int64_t count, stride, runs, element_size;
  int64_t bytes() const { return (int64_t(sizeof *this) + runs * int64_t(sizeof(Run)) + count * element_size + 7) / 8 * 8; }
  Run* run() { return reinterpret_cast<Run*>(this + 1); }
  const Run* run() const { return reinterpret_cast<const Run*>(this + 1); }
  char* held() { return reinterpret_cast<char*>(run() + runs); }
  const char* held() const { return reinterpret_cast<const char*>(run() + runs); }

  template <class T>
  void take() {
    T* to = reinterpret_cast<T*>(held());
    if (!runs) std::memcpy(to, data, size_t(count) * sizeof(T));
    for (int64_t r = 0; r < runs; ++r)
      for (int64_t i = 0; i < run()[r].count; ++i) *to++ = reinterpret_cast<const T*>(data)[run()[r].first + i * stride];
  }
  template <class T>
  bool is_as_it_was() const {
    if (!runs) return std::memcmp(data, held(), size_t(count) * sizeof(T)) == 0;
    const T* was = reinterpret_cast<const T*>(held());
    T changes = 0;
    for (int64_t r = 0; r < runs; ++r) {
      const T* element = reinterpret_cast<const T*>(data) + run()[r].first;
      for (int64_t i = 0, n = run()[r].count; i < n; ++i, element += stride) changes |= T(*element ^ *was++);
    }
    return changes == 0;
  }
};

// The runs through a matrix of `gates` times `units` rows that meet every gate, unit and column.
std::vector<Run> runs_of(int64_t gates, int64_t units, int64_t columns) {
  std::vector<Run> runs;
  const int64_t count = std::max({units, columns, gates});
  for (int64_t i = 0, last_gate = -1; i < count; ++i) {
    const int64_t gate = i * gates / count, unit = i % units, column = i % columns;
    if (gate != last_gate || unit == 0 || column == 0) runs.push_back({(gate * units + unit) * columns + column, 0});
    ++runs.back().count;
    last_gate = gate;
  }
  return runs;
}

// Calls f with a number of the size of an element.
template <class F>
auto by_size(int64_t element_size, F f) {
  return element_size == 8 ? f(uint64_t{}) : element_size == 4 ? f(uint32_t{}) : f(uint16_t{});
}

}  // namespace

Tensor weight_samples_cpu(std::vector<Tensor> weights, int64_t units, bool whole) {
  std::vector<Sample> samples;
  std::vector<std::vector<Run>> runs;
  int64_t bytes = sizeof(int64_t);
  for (const Tensor& weight : weights) {
    const int64_t size = weight.element_size(), count = weight.numel();
    check(weight.dim() <= 2 && weight.is_contiguous() && (size == 2 || size == 4 || size == 8),
          "samples are taken of contiguous vectors and matrices");
    check(weight.const_data_ptr() || !count, "a weight has no memory: its storage has been freed");
    const bool sampled = weight.dim() == 2 && !whole && count * size > WHOLE;
    const int64_t rows = sampled ? weight.size(0) : 0, columns = sampled ? weight.size(1) : 0;
    // A projection's rows are no gates.
    const int64_t step = units > 0 && rows % units == 0 ? units : rows;
    runs.push_back(sampled ? runs_of(rows / step, step, columns) : std::vector<Run>());
    const int64_t taken = sampled ? std::max({step, columns, rows / step}) : count;
    samples.push_back({static_cast<const char*>(weight.const_data_ptr()), taken, columns + 1, int64_t(runs.back().size()), size});
    bytes += samples.back().bytes();
  }
  Tensor kept = torch::stable::new_empty(weights.at(0), {bytes}, ScalarType::Byte);
  char* to = static_cast<char*>(kept.mutable_data_ptr());
  *reinterpret_cast<int64_t*>(to) = int64_t(samples.size());
  to += sizeof(int64_t);
  for (size_t i = 0; i < samples.size(); ++i) {
    Sample* sample = reinterpret_cast<Sample*>(to);
    *sample = samples[i];
    std::copy(runs[i].begin(), runs[i].end(), sample->run());
    by_size(sample->element_size, [&](auto number) { sample->take<decltype(number)>(); });
    to += sample->bytes();
  }
  return kept;
}

bool are_as_they_were(const void* weight_samples) {
  const char* from = static_cast<const char*>(weight_samples);
  int64_t count = *reinterpret_cast<const int64_t*>(from);
  from += sizeof count;
  for (; count > 0; --count) {
    const Sample* sample = reinterpret_cast<const Sample*>(from);
    if (!by_size(sample->element_size, [&](auto number) { return sample->is_as_it_was<decltype(number)>(); })) return false;
    from += sample->bytes();
  }
  return true;
}

}  // namespace rnnfast

int rnnfast_are_as_they_were_cpu(const void* weight_samples) { return rnnfast::are_as_they_were(weight_samples); }
