#include "weight_samples.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tensors.h"

namespace rnnfast {
namespace {

// Followed in memory by what its elements held.
struct Sample {
  const char* data;
  int64_t rows, columns, element_size;
  int64_t count() const { return rows && columns ? std::max(rows, columns) : 0; }
  int64_t bytes() const { return (int64_t(sizeof *this) + count() * element_size + 7) / 8 * 8; }
  char* held() { return reinterpret_cast<char*>(this + 1); }
  const char* held() const { return reinterpret_cast<const char*>(this + 1); }

  // Calls see(i-th element of the sample, i) for all of them, in straight runs along the diagonal.
  template <class T, class F>
  void each(F see) const {
    const T* elements = reinterpret_cast<const T*>(data);
    for (int64_t i = 0, n = count(); i < n;) {
      const int64_t row = i % rows, column = i % columns, run = std::min({rows - row, columns - column, n - i});
      const T* first = elements + row * columns + column;
      for (int64_t k = 0; k < run; ++k) see(first[k * (columns + 1)], i + k);
      i += run;
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

Tensor weight_samples_cpu(std::vector<Tensor> weights) {
  std::vector<Sample> samples;
  int64_t bytes = sizeof(int64_t);
  for (const Tensor& weight : weights) {
    const int64_t columns = weight.dim() == 2 ? weight.size(1) : weight.numel();
    const int64_t size = weight.element_size();
    check(weight.dim() <= 2 && weight.is_contiguous() && (size == 2 || size == 4 || size == 8),
          "samples are taken of contiguous vectors and matrices");
    samples.push_back(
        {static_cast<const char*>(weight.const_data_ptr()), weight.dim() == 2 ? weight.size(0) : 1, columns, size});
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

int rnnfast_are_as_they_were(const void* weight_samples) { return rnnfast::are_as_they_were(weight_samples); }
