#include "weight_samples.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tensors.h"

namespace rnnfast {
namespace {

constexpr int64_t WHOLE = 4096;  // bytes of a matrix that is compared whole: that takes no longer than a larger one's sample

// Followed in memory by what its elements held.
struct Sample {
  const char* data;
  int64_t rows, columns, units, element_size;
  int64_t count() const { return !rows || !columns ? 0 : rows == 1 ? columns : std::max({units, columns, rows / units}); }
  int64_t bytes() const { return (int64_t(sizeof *this) + count() * element_size + 7) / 8 * 8; }
  char* held() { return reinterpret_cast<char*>(this + 1); }
  const char* held() const { return reinterpret_cast<const char*>(this + 1); }

  // Calls see(element of the sample, its index) for all: unit by unit and column by column, each unit in the next gate.
  template <class T, class F>
  void each(F see) const {
    const T* elements = reinterpret_cast<const T*>(data);
    int64_t unit = 0, column = 0, gate = 0;
    for (int64_t i = 0, n = count(); i < n; ++i) {
      see(elements[(gate * units + unit) * columns + column], i);
      if (++unit == units) unit = 0;
      if (++column == columns) column = 0;
      if (++gate * units == rows) gate = 0;
    }
  }
  template <class T>
  void take() {
    T* to = reinterpret_cast<T*>(held());
    each<T>([&](T element, int64_t i) { to[i] = element; });
  }
  template <class T>
  bool is_as_it_was() const {
    if (rows == 1) return std::memcmp(data, held(), size_t(columns * element_size)) == 0;
    const T* was = reinterpret_cast<const T*>(held());
    T changes = 0;
    each<T>([&](T element, int64_t i) { changes |= T(element ^ was[i]); });
    return changes == 0;
  }
};

// Calls f with a number of the size of an element.
template <class F>
auto by_size(int64_t element_size, F f) {
  return element_size == 8 ? f(uint64_t{}) : element_size == 4 ? f(uint32_t{}) : f(uint16_t{});
}

}  // namespace

Tensor weight_samples_cpu(std::vector<Tensor> weights, int64_t units, bool whole) {
  std::vector<Sample> samples;
  int64_t bytes = sizeof(int64_t);
  for (const Tensor& weight : weights) {
    const bool matrix = weight.dim() == 2;
    const int64_t size = weight.element_size();
    const bool sampled = matrix && !whole && weight.numel() * size > WHOLE;
    const int64_t rows = sampled ? weight.size(0) : 1, columns = sampled ? weight.size(1) : weight.numel();
    check(weight.dim() <= 2 && weight.is_contiguous() && (size == 2 || size == 4 || size == 8),
          "samples are taken of contiguous vectors and matrices");
    check(weight.const_data_ptr() || !weight.numel(), "a weight has no memory: its storage has been freed");
    // A projection's rows are no gates.
    const int64_t step = units > 0 && rows % units == 0 ? units : rows;
    samples.push_back({static_cast<const char*>(weight.const_data_ptr()), rows, columns, step, size});
    bytes += samples.back().bytes();
  }
  Tensor kept = torch::stable::new_empty(weights.at(0), {bytes}, ScalarType::Byte);
  char* to = static_cast<char*>(kept.mutable_data_ptr());
  *reinterpret_cast<int64_t*>(to) = int64_t(samples.size());
  to += sizeof(int64_t);
  for (const Sample& each : samples) {
    Sample* sample = reinterpret_cast<Sample*>(to);
    *sample = each;
    by_size(each.element_size, [&](auto number) { sample->take<decltype(number)>(); });
    to += each.bytes();
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
