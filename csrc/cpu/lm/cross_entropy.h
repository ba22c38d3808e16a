// The mean cross entropy of a linear head over rows of hidden states, and its gradients.
#pragma once

#include <cmath>
#include <limits>

#include "../kernels.h"
#include "../layer.h"

namespace rnnfast::RNNFAST_ISA {

// Threads take tasks as they come free. A task owns its part of a result and adds up in one order, so that no bit depends on who
// ran it nor on how many threads there are.
class LinearCrossEntropy {
  static constexpr int V = LANES<float>;
  static constexpr int64_t ROWS = 64;        // of a task that walks rows
  static constexpr int64_t K_BLOCK = 128;    // rows whose products are added up at a time for the gradient of the weight
  static constexpr int64_t CLASSES = 256;    // rows of the gradient of the weight in a task
  static constexpr int64_t WORTH_A_THREAD = 1 << 20;  // multiply-adds
  static constexpr int64_t OF_A_LOGIT = 100;          // multiply-adds that take as long as turning it into a gradient
  static_assert(K_BLOCK % ROWS == 0);

  const LossArgs& x;
  const LossGradients* const d;  // null: the loss alone
  const Panels classes, columns;  // the weight transposed, for logits, and as it is, for the gradient of the hidden states
  const int64_t stride;           // classes in whole vectors
  const int64_t row_tasks, blocks, class_blocks;

 public:
  LinearCrossEntropy(const LossArgs& args, const LossGradients* gradients)
      : x(args),
        d(gradients),
        classes(plain_panels(x.classes, V)),
        columns(plain_panels(x.columns, V)),
        stride(classes.total_vectors * V),
        row_tasks(ceil_div(x.rows, ROWS)),
        blocks(ceil_div(x.rows, K_BLOCK)),
        class_blocks(ceil_div(x.classes, CLASSES)) {}

  // A task turns the logits of its rows into their gradients, and those into the gradients of its hidden states, while they are
  // near. What they make of the weight comes when all rows have been seen.
  double run(int available) const {
    Carver sizes(nullptr), locals(nullptr);
    Memory(*this, sizes);
    Local(*this, locals);
    const int n_threads = threads(available);
    const Scratch scratch(sizes.used() + locals.used() * size_t(n_threads));
    Carver carver(scratch.data());
    const Memory memory(*this, carver);
    const int64_t weight_tasks = d ? columns.count() * class_blocks : 0;
    std::atomic<int64_t> next_rows{0}, next_weights{0};
    Barrier all;
    parallel(n_threads, [&](int thread, int n) {
      Carver mine(scratch.data() + sizes.used() + locals.used() * size_t(thread));
      const Local local(*this, mine);
      pack(memory, thread, n);
      all.wait(n);
      for (int64_t task; (task = next_rows.fetch_add(1)) < row_tasks;) run_rows(memory, local, task);
      all.wait(n);
      for (int64_t task; (task = next_weights.fetch_add(1)) < weight_tasks;)
        weight_gradient(memory, local, task / class_blocks, task % class_blocks * CLASSES);
    });
    double loss = 0;
    for (int64_t task = 0; task < row_tasks; ++task) loss += memory.losses[task];
    for (int64_t c = 0; d && c < x.classes; ++c) {
      double sum = 0;
      for (int64_t task = 0; task < row_tasks; ++task) sum += double(memory.sums[task * stride + c]);
      d->bias[c] = float(sum);
    }
    return loss / double(x.rows);
  }

 private:
  struct Memory {
    float *by_class, *bias, *by_column, *transposed, *sums;
    double* losses;
    Memory(const LinearCrossEntropy& of, Carver& carver)
        : by_class(carver.take<float>(packed_size<float>(of.classes, of.x.columns))),
          bias(carver.take<float>(of.stride)),
          by_column(carver.take<float>(of.d ? packed_size<float>(of.columns, of.x.classes) : 0)),
          transposed(carver.take<float>(of.d ? of.blocks * of.stride * K_BLOCK : 0)),  // the gradients of the logits
          sums(carver.take<float>(of.d ? of.row_tasks * of.stride : 0)),
          losses(carver.take<double>(of.row_tasks)) {}
  };
  struct Local {
    float *logits, *hidden, *sums, *tile;
    Local(const LinearCrossEntropy& of, Carver& carver)
        : logits(carver.take<float>(ROWS * of.stride)),
          hidden(carver.take<float>(of.d ? K_BLOCK * MAX_VECTORS * V : 0)),
          sums(carver.take<float>(of.d ? CLASSES * MAX_VECTORS * V : 0)),
          tile(carver.take<float>(MAX_ROWS * MAX_VECTORS * V)) {}
  };

  int threads(int available) const {
    const int64_t logits = x.rows * x.classes, products = logits * (x.columns + OF_A_LOGIT);
    const int64_t wanted = max64(1, min64(available, products / WORTH_A_THREAD));
    return worth_threads(int(wanted), (products + (d ? 2 * logits * x.columns : 0)) / V);
  }

  // This thread's share of the panels.
  void pack(const Memory& memory, int thread, int threads) const {
    for (int64_t p = thread; p < classes.count(); p += threads) pack_classes(memory, p);
    for (int64_t p = thread; d && p < columns.count(); p += threads)
      pack_rows<float>(memory.by_column + panel_offset<float>(columns, p, x.classes), columns.width(p),
                       [&](int64_t k) { return x.weight + k * x.columns; }, x.classes, p * columns.vectors * V, x.columns);
  }
  void pack_classes(const Memory& memory, int64_t p) const {
    for (int c = 0; c < classes.width(p); ++c) {
      const int64_t first = (p * classes.vectors + c) * V;
      const float* rows[V];
      for (int e = 0; e < V; ++e) {
        const int64_t row = first + e;
        rows[e] = row < x.classes ? x.weight + row * x.columns : nullptr;
        // Lanes of no class get no probability.
        memory.bias[row] = row >= x.classes ? -std::numeric_limits<float>::infinity() : x.bias ? x.bias[row] : 0.f;
      }
      pack_columns<float>(memory.by_class + panel_offset<float>(classes, p, x.columns), classes.width(p), c, rows, x.columns);
    }
  }

  void run_rows(const Memory& memory, const Local& local, int64_t task) const {
    const int64_t first = task * ROWS, n = min64(ROWS, x.rows - first);
    for (int64_t p = 0; p < classes.count(); ++p) {
      const int width = classes.width(p);
      for_tiles(n, width, [&](int64_t row, int count, int64_t, int64_t) {
        const float *a[MAX_ROWS], *start[MAX_ROWS];
        for (int r = 0; r < count; ++r) a[r] = x.hidden + (first + row + r) * x.columns, start[r] = memory.bias;
        const int64_t column = p * classes.vectors * V;
        tile_function<float>(count, width)(x.columns, a, memory.by_class + panel_offset<float>(classes, p, x.columns), start,
                                           column, nullptr, local.logits + row * stride + column, stride, nullptr);
      });
    }
    double loss = 0;
    for (int64_t row = 0; row < n; row += V)
      loss += softmax(local.logits + row * stride, x.targets + first + row, int(min64(V, n - row)));
    memory.losses[task] = loss;
    if (!d) return;
    float* sums = memory.sums + task * stride;
    for (int64_t j = 0; j < stride; j += V) store(sums + j, F32{});
    pack_transposed<float>(memory.transposed + first / K_BLOCK * stride * K_BLOCK + first % K_BLOCK, K_BLOCK,
                           [&](int64_t k) { return static_cast<const float*>(local.logits + k * stride); }, n, 0, x.classes, sums);
    hidden_gradient(memory, local, first, n);
  }

  // From the logits of n rows, at most V, to their gradients: probabilities, less 1 at the target, over the number of rows of all;
  // returns these rows' loss.
  double softmax(float* logits, const int64_t* targets, int n) const {
    F32 of_rows[V] = {};
    for (int r = 0; r < n; ++r) {
      const float* row = logits + r * stride;
      of_rows[r] = load(row);
      for (int64_t j = V; j < stride; j += V) of_rows[r] = larger(load(row + j), of_rows[r]);
    }
    float most[V], inverse[V];
    store(most, across(of_rows, larger));
    double of_targets = 0;
    for (int r = 0; r < n; ++r) {
      float* row = logits + r * stride;
      of_targets += double(row[targets[r]]) - double(most[r]);
      of_rows[r] = F32{};
      for (int64_t j = 0; j < stride; j += V) {
        const F32 l = load(row + j) - splat(most[r]);
        const auto s = SplitExp<float>::of(at_least(Math<float>::lowest, l));
        const F32 e = l < splat(Math<float>::lowest) ? F32{} : fma(s.scale, s.m, s.scale);
        store(row + j, e);
        of_rows[r] += e;
      }
    }
    const F32 sums = across(of_rows, [](F32 a, F32 b) { return a + b; });
    store(inverse, splat(1.f) / sums);
    const float scale = 1 / float(x.rows);
    double product = 1;  // of sums between 1 and the number of classes: it has one logarithm instead of V
    for (int r = 0; r < n; ++r) {
      float* row = logits + r * stride;
      product *= double(sums[r]);
      if (!d) continue;
      const float at_target = row[targets[r]] * inverse[r];
      for (int64_t j = 0; j < stride; j += V) store(row + j, load(row + j) * splat(inverse[r]) * splat(scale));
      row[targets[r]] = (at_target - 1.f) * scale;
    }
    return std::log(product) - of_targets;
  }

  RNNFAST_INLINE F32 larger(F32 a, F32 b) { return a > b ? a : b; }

  // What each row comes to, in the lane of its number: pairs of its lanes, and pairs of those.
  template <class F>
  RNNFAST_INLINE F32 across(F32* rows, F f) {
    transpose(rows);
#pragma GCC unroll 8
    for (int n = V / 2; n > 0; n /= 2)
#pragma GCC unroll 8
      for (int e = 0; e < n; ++e) rows[e] = f(rows[e], rows[e + n]);
    return rows[0];
  }

  // Of rows [first, first + n), whose logits' gradients are in local.logits.
  void hidden_gradient(const Memory& memory, const Local& local, int64_t first, int64_t n) const {
    for (int64_t p = 0; p < columns.count(); ++p) {
      const int width = columns.width(p);
      const int64_t column = p * columns.vectors * V, there = min64(width * V, x.columns - column);
      const bool direct = there == width * V;
      for_tiles(n, width, [&](int64_t row, int count, int64_t, int64_t) {
        const float *a[MAX_ROWS], *start[MAX_ROWS];
        for (int r = 0; r < count; ++r) a[r] = local.logits + (row + r) * stride, start[r] = ZEROS<float>;
        float* const out = d->hidden + (first + row) * x.columns + column;
        tile_function<float>(count, width)(x.classes, a, memory.by_column + panel_offset<float>(columns, p, x.classes), start, 0,
                                           nullptr, direct ? out : local.tile, direct ? x.columns : width * V, nullptr);
        for (int r = 0; r < count && !direct; ++r) convert_row(out + r * x.columns, local.tile + r * width * V, there);
      });
    }
  }

  void weight_gradient(const Memory& memory, const Local& local, int64_t p, int64_t first) const {
    const int width = columns.width(p);
    const int64_t n = min64(CLASSES, x.classes - first), column = p * columns.vectors * V;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k0 = block * K_BLOCK, k = min64(K_BLOCK, x.rows - k0);
      pack_rows<float>(local.hidden, width, [&](int64_t row) { return x.hidden + (k0 + row) * x.columns; }, k, column, x.columns);
      const float* transposed = memory.transposed + (block * stride + first) * K_BLOCK;
      for_tiles(n, width, [&](int64_t row, int count, int64_t, int64_t) {
        const float *a[MAX_ROWS], *start[MAX_ROWS];
        float* const sums = local.sums + row * width * V;
        for (int r = 0; r < count; ++r) {
          a[r] = transposed + (row + r) * K_BLOCK;
          start[r] = block ? sums + r * width * V : ZEROS<float>;
        }
        tile_function<float>(count, width)(k, a, local.hidden, start, 0, nullptr, sums, width * V, nullptr);
      });
    }
    for (int64_t row = 0; row < n; ++row)
      convert_row(d->weight + (first + row) * x.columns + column, local.sums + row * width * V,
                  min64(width * V, x.columns - column));
  }
};

}  // namespace rnnfast::RNNFAST_ISA
