// The mean cross entropy of a linear head over rows of hidden states, and its gradients.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"
#include "layer.h"

namespace rnnfast::RNNFAST_ISA {

// Threads take tasks as they come free. A task owns its part of a result and adds up in one order, so that no bit depends on who
// ran it nor on how many threads there are.
class LinearCrossEntropy {
  static constexpr int V = LANES<float>;
  static constexpr int64_t ROWS = 48;        // of a task that walks rows
  static constexpr int64_t K_BLOCK = 128;    // rows whose products are added up at a time for the gradient of the weight
  static constexpr int64_t CLASSES = 256;    // rows of the gradient of the weight in a task
  static constexpr int64_t WORTH_A_THREAD = 1 << 20;  // multiply-adds

  const LossArgs& x;
  const Panels classes, columns;  // the weight transposed, for logits, and as it is, for the gradient of the hidden states
  const int64_t row_tasks, blocks, class_blocks;

 public:
  explicit LinearCrossEntropy(const LossArgs& args)
      : x(args),
        classes(plain_panels(x.classes, V)),
        columns(plain_panels(x.columns, V)),
        row_tasks(ceil_div(x.rows, ROWS)),
        blocks(ceil_div(x.rows, K_BLOCK)),
        class_blocks(ceil_div(x.classes, CLASSES)) {}

  // Returns the loss, and leaves the gradients of rows * loss by the logits in x.d_logits.
  double forward(int available) const {
    Carver sizes(nullptr);
    ForwardMemory(*this, sizes);
    const Scratch scratch(sizes.used());
    Carver carver(scratch.data());
    const ForwardMemory memory(*this, carver);
    std::atomic<int64_t> next{0};
    Barrier all;
    parallel(threads(available), [&](int thread, int n) {
      for (int64_t p = thread; p < classes.count(); p += n) pack_classes(memory, p);
      all.wait(n);
      for (int64_t task; (task = next.fetch_add(1)) < row_tasks;) memory.losses[task] = run_rows(memory, task);
    });
    double sum = 0;
    for (int64_t task = 0; task < row_tasks; ++task) sum += memory.losses[task];
    return sum / double(x.rows);
  }

  // `scale`: the gradient by the loss, over rows.
  void backward(const LossGradients& d, float scale, int available) const {
    Carver sizes(nullptr), locals(nullptr);
    BackwardMemory(*this, sizes);
    Local{locals};
    const int n_threads = threads(available);
    const Scratch scratch(sizes.used() + locals.used() * size_t(n_threads));
    Carver carver(scratch.data());
    const BackwardMemory memory(*this, carver);
    const int64_t weight_tasks = columns.count() * class_blocks;
    std::atomic<int64_t> next{0};
    Barrier all;
    parallel(n_threads, [&](int thread, int n) {
      Carver mine(scratch.data() + sizes.used() + locals.used() * size_t(thread));
      const Local local(mine);
      for (int64_t p = thread; p < columns.count(); p += n)
        pack_rows<float>(memory.weight + panel_offset<float>(columns, p, x.classes), columns.width(p),
                         [&](int64_t k) { return x.weight + k * x.columns; }, x.classes, p * columns.vectors * V, x.columns);
      for (int64_t block = thread; block < blocks; block += n) scale_block(memory, block, scale);
      all.wait(n);
      for (int64_t task; (task = next.fetch_add(1)) < weight_tasks + row_tasks;) {
        if (task < weight_tasks)
          weight_gradient(memory, local, d.weight, task / class_blocks, task % class_blocks * CLASSES);
        else
          hidden_gradient(memory, local, d.hidden, task - weight_tasks);
      }
    });
    for (int64_t c = 0; c < x.classes; ++c) {
      float sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += memory.sums[block * padded_classes() + c];
      d.bias[c] = sum;
    }
  }

 private:
  struct ForwardMemory {
    float *weight, *bias;
    double* losses;
    ForwardMemory(const LinearCrossEntropy& of, Carver& carver)
        : weight(carver.take<float>(packed_size<float>(of.classes, of.x.columns))),
          bias(carver.take<float>(of.padded_classes())),
          losses(carver.take<double>(of.row_tasks)) {}
  };
  struct BackwardMemory {
    float *weight, *scaled, *transposed, *sums;
    BackwardMemory(const LinearCrossEntropy& of, Carver& carver)
        : weight(carver.take<float>(packed_size<float>(of.columns, of.x.classes))),
          scaled(carver.take<float>(of.x.rows * of.x.stride)),
          transposed(carver.take<float>(of.blocks * of.padded_classes() * K_BLOCK)),
          sums(carver.take<float>(of.blocks * of.padded_classes())) {}
  };
  struct Local {
    float *hidden, *sums, *tile;
    explicit Local(Carver& carver)
        : hidden(carver.take<float>(K_BLOCK * MAX_VECTORS * V)),
          sums(carver.take<float>(CLASSES * MAX_VECTORS * V)),
          tile(carver.take<float>(MAX_ROWS * MAX_VECTORS * V)) {}
  };

  int64_t padded_classes() const { return classes.total_vectors * V; }
  int threads(int available) const {
    return int(max64(1, min64(available, x.rows * x.classes * x.columns / WORTH_A_THREAD)));
  }

  void pack_classes(const ForwardMemory& memory, int64_t p) const {
    for (int c = 0; c < classes.width(p); ++c) {
      const int64_t first = (p * classes.vectors + c) * V;
      const float* rows[V];
      for (int e = 0; e < V; ++e) {
        const int64_t row = first + e;
        rows[e] = row < x.classes ? x.weight + row * x.columns : nullptr;
        // Lanes of no class get no probability.
        memory.bias[row] = row >= x.classes ? -std::numeric_limits<float>::infinity() : x.bias ? x.bias[row] : 0.f;
      }
      pack_columns<float>(memory.weight + panel_offset<float>(classes, p, x.columns), classes.width(p), c, rows, x.columns);
    }
  }

  // The sum of the losses of a task's rows.
  double run_rows(const ForwardMemory& memory, int64_t task) const {
    const int64_t first = task * ROWS, n = min64(ROWS, x.rows - first);
    for (int64_t p = 0; p < classes.count(); ++p) {
      const int width = classes.width(p);
      for_tiles(n, width, [&](int64_t row, int count, int64_t, int64_t) {
        const float *a[MAX_ROWS], *start[MAX_ROWS];
        row += first;
        for (int r = 0; r < count; ++r) a[r] = x.hidden + (row + r) * x.columns, start[r] = memory.bias;
        const int64_t column = p * classes.vectors * V;
        tile_function<float>(count, width)(x.columns, a, memory.weight + panel_offset<float>(classes, p, x.columns), start, column,
                                           nullptr, x.d_logits + row * x.stride + column, x.stride, nullptr);
      });
    }
    double sum = 0;
    for (int64_t row = first; row < first + n; ++row) sum += run_row(x.d_logits + row * x.stride, x.targets[row]);
    return sum;
  }

  // From logits to probabilities, less 1 at the target; returns the loss.
  double run_row(float* logits, int64_t target) const {
    const int64_t n = padded_classes();
    F32 largest = load(logits);
    for (int64_t j = V; j < n; j += V) {
      const F32 l = load(logits + j);
      largest = l > largest ? l : largest;
    }
    float most = largest[0];
    for (int e = 1; e < V; ++e) most = largest[e] > most ? largest[e] : most;
    const double of_target = double(logits[target]) - double(most);
    F32 sums{};
    for (int64_t j = 0; j < n; j += V) {
      const F32 l = load(logits + j) - splat(most);
      const auto s = SplitExp<float>::of(at_least(Math<float>::lowest, l));
      const F32 e = l < splat(Math<float>::lowest) ? F32{} : fma(s.scale, s.m, s.scale);
      store(logits + j, e);
      sums += e;
    }
    double sum = 0;
    for (int e = 0; e < V; ++e) sum += double(sums[e]);
    const F32 inverse = splat(float(1 / sum));
    for (int64_t j = 0; j < n; j += V) store(logits + j, load(logits + j) * inverse);
    logits[target] -= 1.f;
    return std::log(sum) - of_target;
  }

  // A block of rows of x.d_logits times `scale`, as they are and transposed, and their sums by class.
  void scale_block(const BackwardMemory& memory, int64_t block, float scale) const {
    const int64_t first = block * K_BLOCK, n = min64(K_BLOCK, x.rows - first);
    float *scaled = memory.scaled + first * x.stride, *sums = memory.sums + block * padded_classes();
    for (int64_t row = 0; row < n; ++row)
      for (int64_t j = 0; j < padded_classes(); j += V)
        store(scaled + row * x.stride + j, load(x.d_logits + (first + row) * x.stride + j) * splat(scale));
    for (int64_t j = 0; j < padded_classes(); j += V) store(sums + j, F32{});
    pack_transposed<float>(memory.transposed + block * padded_classes() * K_BLOCK, K_BLOCK,
                           [&](int64_t k) { return static_cast<const float*>(scaled + k * x.stride); }, n, 0, x.classes, sums);
  }

  void hidden_gradient(const BackwardMemory& memory, const Local& local, float* d_hidden, int64_t task) const {
    const int64_t first = task * ROWS, n = min64(ROWS, x.rows - first);
    for (int64_t p = 0; p < columns.count(); ++p) {
      const int width = columns.width(p);
      const int64_t column = p * columns.vectors * V, there = min64(width * V, x.columns - column);
      const bool direct = there == width * V;
      for_tiles(n, width, [&](int64_t row, int count, int64_t, int64_t) {
        const float *a[MAX_ROWS], *start[MAX_ROWS];
        row += first;
        for (int r = 0; r < count; ++r) a[r] = memory.scaled + (row + r) * x.stride, start[r] = zeros();
        float* const out = d_hidden + row * x.columns + column;
        tile_function<float>(count, width)(x.classes, a, memory.weight + panel_offset<float>(columns, p, x.classes), start, 0,
                                           nullptr, direct ? out : local.tile, direct ? x.columns : width * V, nullptr);
        for (int r = 0; r < count && !direct; ++r) convert_row(out + r * x.columns, local.tile + r * width * V, there);
      });
    }
  }

  void weight_gradient(const BackwardMemory& memory, const Local& local, float* d_weight, int64_t p, int64_t first) const {
    const int width = columns.width(p);
    const int64_t n = min64(CLASSES, x.classes - first), column = p * columns.vectors * V;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k0 = block * K_BLOCK, k = min64(K_BLOCK, x.rows - k0);
      pack_rows<float>(local.hidden, width, [&](int64_t row) { return x.hidden + (k0 + row) * x.columns; }, k, column, x.columns);
      const float* transposed = memory.transposed + (block * padded_classes() + first) * K_BLOCK;
      for_tiles(n, width, [&](int64_t row, int count, int64_t, int64_t) {
        const float *a[MAX_ROWS], *start[MAX_ROWS];
        float* const sums = local.sums + row * width * V;
        for (int r = 0; r < count; ++r) a[r] = transposed + (row + r) * K_BLOCK, start[r] = block ? sums + r * width * V : zeros();
        tile_function<float>(count, width)(k, a, local.hidden, start, 0, nullptr, sums, width * V, nullptr);
      });
    }
    for (int64_t row = 0; row < n; ++row)
      convert_row(d_weight + (first + row) * x.columns + column, local.sums + row * width * V,
                  min64(width * V, x.columns - column));
  }

  static const float* zeros() {
    alignas(64) static constexpr float all[MAX_VECTORS * V] = {};
    return all;
  }
};

}  // namespace rnnfast::RNNFAST_ISA
