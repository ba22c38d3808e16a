// What follows the backward scan and is parallel in time: the gradients of the weights and the biases.
#pragma once

#include <type_traits>

#include "input_gradient.h"
#include "pieces.h"
#include "sums.h"

namespace rnnfast::RNNFAST_ISA {

// Work is cut into tasks that threads take as they come free. A task owns a piece of a result and adds up the rows of the part at
// work in their order in memory, so the result depends neither on who ran it nor on the number of threads. Each part adds to what
// the parts before it have left.
template <class S, class O>
class WeightGradients {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  static constexpr bool HAS_PIECES = std::is_same_v<S, float> && V == PIECE_COLUMNS;
  // Rows of the batch that are packed and added up at a time: sums of blocks, added in their order, round less than one
  // long sum.
  static constexpr int64_t K_BLOCK = 128;
  // Rows whose sums come to be one before they are added to those of the rows before, so that of very many rows, too, few
  // numbers are rounded to the size of the whole sum. (In bfloat16 the result itself rounds more.)
  static constexpr int64_t GROUP_ROWS = 16 * K_BLOCK;
  static constexpr int64_t PART_BYTES = 4 << 20;  // gradients of the gates that are kept, or those of GROUP_ROWS
  // Rows, and columns of the factors, from which on a product in pieces is worth packing them.
  static constexpr int64_t PIECES_ROWS = 64, PIECES_COLUMNS = 192;
  static constexpr int64_t ID_COLUMNS = 64;

  const BackwardArgs& x;
  const ScanShape& s;
  const Gradients<S, O>& d;
  const int threads;
  const int64_t gate_rows;
  const Panels inputs, states, units_;
  const bool both_weights;  // w_ih's gradient is computed beside w_hh's, from the same gradients of the gates
  const MatrixUnit* const matrix_unit;  // null where it is not used
  int64_t block_rows;       // rows of a weight's gradient in a task
  T *biases, *lost;      // (2, D, bias_stride): the sums of b_hh and b_ih, and what they have rounded off
  T* ids = nullptr;      // (tasks, 2, I, ID_COLUMNS): those of token ids, from one part to the next
  T* totals = nullptr;   // (2 D G*H + D P, sum_columns): the sums of w_hh, w_ih and w_hr, likewise, where the result rounds more

  struct Kind {
    int64_t tasks;
    void (WeightGradients::*run)(int64_t task, char* local) const;
  };
  Kind kinds[5];  // small tasks behind large ones, so that threads end together

 public:
  WeightGradients(const BackwardArgs& args, const Gradients<S, O>& gradients, int how_many)
      : x(args),
        s(args.shape),
        d(gradients),
        threads(how_many),
        gate_rows(s.gates() * s.hidden),
        inputs(plain_panels(s.input, V)),
        states(plain_panels(s.state, V)),
        units_(plain_panels(s.hidden, V)),
        both_weights(x.d_w_hh && x.d_w_ih && !s.ids && d.last == 0),
        matrix_unit(HAS_PIECES && s.rows >= PIECES_ROWS ? rnnfast::matrix_unit() : nullptr) {
    // Each task packs all that is multiplied with its columns, which takes a good part of the time where these are few. Sums may well
    // be more than a core's cache holds, but not those of the matrix unit, which is faster: they take half of it and leave the rest to
    // the packed rows of one K_BLOCK. Tasks come out equal for each thread: two or more, as no thread is as fast as the other, if
    // that does not make them small.
    constexpr int64_t SMALL = 512;
    const int64_t sum_bytes = matrix_unit ? near_bytes() / 2 : 4 * near_bytes();
    const int64_t most = max64(V, sum_bytes / (sum_columns() * int64_t(sizeof(T))));
    const int64_t rounds = max64(ceil_div(gate_rows, threads * most), min64(2, gate_rows / (threads * SMALL)));
    block_rows = round_up(ceil_div(gate_rows, threads * rounds), V);
    const int64_t blocks = ceil_div(gate_rows, block_rows);
    kinds[0] = {x.d_w_hh ? s.lanes * blocks : 0, &WeightGradients::w_hh_gradient};
    // The products of a weight's gradient add up those of the bias beside it, even where the weight has no columns.
    const bool of_input = x.d_w_ih || (s.input == 0 && s.cell == Cell::gru && x.d_w_hh && x.d_b_ih);
    kinds[1] = {of_input && !s.ids && !both_weights ? s.lanes * blocks : 0, &WeightGradients::w_ih_gradient};
    kinds[2] = {x.d_w_ih && s.ids ? s.lanes * ceil_div(gate_rows, ID_COLUMNS) : 0, &WeightGradients::w_ids_gradient};
    kinds[3] = {x.d_w_hr ? s.lanes * ceil_div(s.state, block_rows) : 0, &WeightGradients::w_hr_gradient};
    kinds[4] = {x.d_b_ih && !x.d_w_hh ? s.lanes * ceil_div(gate_rows, SUM_COLUMNS) : 0, &WeightGradients::bias_gradient};
  }

  void carve(Carver& carver) {
    biases = carver.take<T>(2 * s.lanes * bias_stride());
    lost = carver.take<T>(2 * s.lanes * bias_stride());
    if (d.parts > 1 && ids_kept()) ids = carver.take<T>(ids_kept());
    if (d.parts > 1 && totals_kept()) totals = carver.take<T>(totals_kept());
  }
  // Parts to cut the scan in: several where that takes less memory, and where the directions of a layer, which meet in the gradient
  // of the input, may come to a row in different ones.
  int64_t parts() const {
    const int64_t row_bytes = d.stride * int64_t(sizeof(O));
    const int64_t parts = min64(ceil_div(s.rows, max64(GROUP_ROWS, PART_BYTES / row_bytes)), s.steps);
    if (parts < 2 || d.is_kept || (x.d_input && s.bidirectional && !InputGradient<S, O>::DIRECTIONS_APART)) return 1;
    const int64_t saved = s.lanes * (s.rows - s.rows / parts) * row_bytes;
    return saved > (ids_kept() + totals_kept()) * int64_t(sizeof(T)) ? parts : 1;
  }
  size_t local_bytes() const {
    Carver carver(nullptr);
    ProductBuffers(*this, carver);
    Carver other(nullptr);
    IdBuffers(*this, 0, other);
    other.take<T>(SUM_COLUMNS);
    return carver.used() > other.used() ? carver.used() : other.used();
  }
  int64_t tasks() const {
    int64_t n = 0;
    for (const Kind& kind : kinds) n += kind.tasks;
    return n;
  }
  void run(int64_t task, char* local) const {
    for (const Kind& kind : kinds) {
      if (task < kind.tasks) return (this->*kind.run)(task, local);
      task -= kind.tasks;
    }
  }

 private:
  int64_t bias_stride() const { return round_up(gate_rows, SUM_COLUMNS); }
  int64_t ids_kept() const { return kinds[2].tasks * 2 * s.input * ID_COLUMNS; }
  int64_t totals_kept() const { return sizeof(S) == sizeof(T) ? 0 : s.lanes * (2 * gate_rows + s.state) * sum_columns(); }

  // Columns of the sums of a product, whichever weight it is of.
  int64_t sum_columns() const {
    const int64_t of_input = s.ids ? 0 : inputs.total_vectors, of_state = states.total_vectors;
    return V * max64(both_weights ? of_input + of_state : max64(of_input, of_state), units_.total_vectors);
  }

  struct ProductBuffers {
    O *a, *w;
    char *a_pieces, *w_pieces;  // in the place of a and w
    uint32_t* largest;          // of a_pieces
    int64_t* groups;
    T *sums, *bias;
    int64_t a_stride, sums_stride;
    ProductBuffers(const WeightGradients& of, Carver& carver) {
      a_stride = round_up(K_BLOCK, V * Product<O>::depth);
      sums_stride = of.sum_columns();
      const int64_t m_groups = of.matrix_unit ? ceil_div(of.block_rows, PIECE_COLUMNS) : 0;
      const int64_t n_groups = of.matrix_unit ? ceil_div(sums_stride, PIECE_COLUMNS) : 0;
      const auto take_either = [&](int64_t numbers, int64_t bytes) {
        return carver.take<char>(max64(numbers * int64_t(sizeof(O)), bytes));
      };
      a_pieces = take_either(of.block_rows * a_stride, m_groups * pieces_bytes(K_BLOCK));
      w_pieces = take_either(K_BLOCK * sums_stride, n_groups * pieces_bytes(K_BLOCK));
      a = reinterpret_cast<O*>(a_pieces);
      w = reinterpret_cast<O*>(w_pieces);
      largest = carver.take<uint32_t>(m_groups);
      groups = carver.take<int64_t>(m_groups);
      sums = carver.take<T>(of.block_rows * sums_stride);
      bias = carver.take<T>(of.block_rows + V);
    }
  };

  struct IdBuffers {
    T *sums, *lost, *blocks;  // (I, ID_COLUMNS)
    uint8_t* counts;   // the rows in each block
    IdBuffers(const WeightGradients& of, int64_t task, Carver& carver) {
      const int64_t count = of.s.ids ? of.s.input * ID_COLUMNS : 0;
      sums = of.ids ? of.ids + task * 2 * count : carver.take<T>(2 * count);
      lost = sums + count;
      blocks = carver.take<T>(count);
      counts = carver.take<uint8_t>(of.s.ids ? of.s.input : 0);
    }
  };

  // What the gradients of the gates are multiplied with for a weight's gradient: row(k)[:columns] for each row k of the batch.
  template <class Row>
  struct Factor {
    const Panels& panels;
    int64_t columns;
    Row row;
    S* out;
    T* total;        // where the sums of all parts are kept, or null
    int64_t at = 0;  // its first column in the sums
  };
  template <class Row>
  Factor(const Panels&, int64_t, Row, S*, T*, int64_t) -> Factor<Row>;

  // The sums of a task's biases, of `kind` 0 for b_hh and 1 for b_ih, and where they go in the end.
  struct Bias {
    T *sums, *lost;
    S *out, *again;  // or null
  };
  Bias bias_of(int kind, int64_t lane, int64_t first, void* d_bias, void* d_again) const {
    const int64_t at_ = (kind * s.lanes + lane) * bias_stride() + first, out = lane * gate_rows + first;
    return {biases + at_, lost + at_, d_bias ? at<S>(d_bias, out) : nullptr, d_again ? at<S>(d_again, out) : nullptr};
  }
  void begin_bias(const Bias& bias, int64_t n) const {
    if (!d.is_first_part()) return;
    std::memset(bias.sums, 0, size_t(n) * sizeof(T));
    std::memset(bias.lost, 0, size_t(n) * sizeof(T));
  }
  void end_bias(const Bias& bias, int64_t n) const {
    if (!d.is_last_part()) return;
    convert_row(bias.out, bias.sums, n);
    if (bias.again) convert_row(bias.again, bias.sums, n);
  }

  // factor.out[m, :] = sum over rows k of a(k)[column(m)] factor.row(k)[:], for m in [first, end), for each factor. column is
  // contiguous but at `jump`. Where a bias is wanted, it is the sum of a(k)[column(m)].
  template <class A, class Column, class... Factors>
  void product(int64_t lane, int64_t first, int64_t end, A a, Column column, int64_t jump, const Bias& bias, char* local,
               const Factors&... factors) const {
    Carver carver(local);
    const ProductBuffers buffers(*this, carver);
    const int64_t m_rows = end - first, row = d.rows(lane).first, rows = d.rows(lane).count();
    T* const block_bias = bias.out ? buffers.bias : nullptr;
    // The processor does not see rows coming that are a page or more.
    constexpr int64_t PAGE = 4096;
    const int64_t row_bytes = d.stride * int64_t(sizeof(O));
    const bool far = row_bytes >= PAGE && rows * row_bytes > near_bytes();
    if (block_bias) begin_bias(bias, round_up(m_rows, V));
    const bool as_pieces = uses_pieces(jump, factors...);
    // Of few rows, the error is that of the longest sum; of many, that of the number of sums.
    const int64_t k_block = !as_pieces && s.rows <= 8 * K_BLOCK ? K_BLOCK / 2 : K_BLOCK;
    for (int64_t k0 = 0; k0 < rows; k0 += k_block) {
      const int64_t k = min64(k_block, rows - k0);
      const bool begins = begins_at(k0);
      const auto a_row = [&](int64_t i) { return a(row + k0 + i); };
      if (block_bias) std::memset(block_bias, 0, size_t(m_rows + V) * sizeof(T));
      // For n columns of a, from first + m on.
      const auto multiply = [&](int64_t m, int64_t n, T* column_sums) {
        const int64_t begin = first + m, cut = max64(begin, min64(jump, begin + n));
        O* const packed = buffers.a + m * buffers.a_stride;
        if (begin < cut) pack_transposed<O>(packed, buffers.a_stride, a_row, k, column(begin), cut - begin, column_sums, far);
        if (cut < begin + n)
          pack_transposed<O>(packed + (cut - begin) * buffers.a_stride, buffers.a_stride, a_row, k, column(cut), begin + n - cut,
                             column_sums ? column_sums + (cut - begin) : nullptr, far);
        (add_products(buffers, m, n, row + k0, k, begins, factors), ...);
      };
      const auto column_of = [&](int64_t m) { return column(first + m); };
      if (!as_pieces || !multiply_in_pieces(buffers, row + k0, k, begins, m_rows, a_row, column_of, block_bias, multiply, factors...))
        multiply(0, m_rows, block_bias);
      if (block_bias) add_block(bias.sums, bias.lost, block_bias, m_rows);
      if (in_groups() && (k0 + k) % GROUP_ROWS == 0 && k0 + k < rows) (add_group(buffers, m_rows, k0, factors), ...);
    }
    if (in_groups())
      (add_group(buffers, m_rows, rows - 1, factors), ...);
    else if (d.is_last_part())
      (take_sums(buffers, m_rows, factors), ...);
    if (block_bias) end_bias(bias, m_rows);
  }

  // Whatever the task's part of a, and whether the other weight's gradient is wanted, too: the bits depend on it.
  template <class... Factors>
  bool uses_pieces(int64_t jump, const Factors&... factors) const {
    const int64_t of_both = d.last == 0 && !s.ids ? inputs.total_vectors + states.total_vectors : 0;
    return matrix_unit && max64(of_both, (factors.panels.total_vectors + ...)) * V >= PIECES_COLUMNS &&
           (jump == gate_rows || jump % PIECE_COLUMNS == 0);
  }
  // As `product`, for the rows [row, row + k): in pieces, and by multiply(first column of a, columns, sums) where these cannot hold the
  // numbers. False where they cannot hold those of a factor, and nothing is done.
  template <class A, class Column, class Multiply, class... Factors>
  bool multiply_in_pieces(const ProductBuffers& buffers, int64_t row, int64_t k, bool begins, int64_t m_rows, A a_row, Column column,
                          T* bias, Multiply multiply, const Factors&... factors) const {
    if constexpr (HAS_PIECES) {
      if (!(pack_pieces_of(buffers, row, k, factors) && ...)) return false;
      pack_pieces_transposed(buffers.a_pieces, a_row, k, column, m_rows, buffers.largest, bias);
      const int64_t groups = ceil_div(m_rows, PIECE_COLUMNS);
      int64_t held = 0;
      for (int64_t g = 0; g < groups; ++g)
        if (pieces_hold(buffers.largest[g])) buffers.groups[held++] = g;
      const auto multiply_by = [&](const auto& factor) {
        const Sums sums = sums_of(buffers, factor);
        matrix_unit->multiply({buffers.a_pieces, pieces_at(buffers, factor.at), piece_chunks(k), groups,
                               factor.panels.total_vectors, buffers.groups, held, sums.data, m_rows, sums.stride, begins});
      };
      (multiply_by(factors), ...);
      for (int64_t g = 0; g < groups; ++g)
        if (!pieces_hold(buffers.largest[g]))
          multiply(g * PIECE_COLUMNS, min64(PIECE_COLUMNS, m_rows - g * PIECE_COLUMNS), nullptr);
      return true;
    }
    return false;
  }
  char* pieces_at(const ProductBuffers& buffers, int64_t column) const {
    return buffers.w_pieces + column / PIECE_COLUMNS * pieces_bytes(K_BLOCK);
  }
  // Packs rows [row, row + k) of a factor in pieces, and tells whether these hold the numbers.
  template <class Row>
  bool pack_pieces_of(const ProductBuffers& buffers, int64_t row, int64_t k, const Factor<Row>& factor) const {
    const float* rows[K_BLOCK];
    for (int64_t i = 0; i < k; ++i) rows[i] = factor.row(row + i);
    return pieces_hold(pack_pieces(pieces_at(buffers, factor.at), rows, k, factor.columns));
  }
  // Whether a sum begins with the part's row k0.
  bool begins_at(int64_t k0) const { return in_groups() ? k0 % GROUP_ROWS == 0 : d.is_first_part() && k0 == 0; }

  bool in_groups() const { return sizeof(S) == sizeof(T) && s.rows > GROUP_ROWS; }
  // Adds the sums of the group of rows that ends with the block of the part's row k0 to the result.
  template <class Row>
  void add_group(const ProductBuffers& buffers, int64_t m_rows, int64_t k0, const Factor<Row>& factor) const {
    const Sums sums = sums_of(buffers, factor);
    if (d.is_first_part() && k0 < GROUP_ROWS) return take_sums(buffers, m_rows, factor);
    for (int64_t m = 0; m < m_rows; ++m)
      for (int64_t j = 0; j < factor.columns; j += V) {
        const int n = int(min64(V, factor.columns - j));
        S* const result = factor.out + m * factor.columns + j;
        store(result, load(result, n) + load(sums.data + m * sums.stride + j), n);
      }
  }

  // The sums of a factor: its result itself, where they fit and are not those of a group or a part.
  struct Sums {
    T* data;
    int64_t stride;
  };
  template <class Row>
  Sums sums_of(const ProductBuffers& buffers, const Factor<Row>& factor) const {
    if constexpr (sizeof(S) == sizeof(T))
      if (factor.columns % V == 0 && !in_groups()) return {factor.out, factor.columns};
    return {(factor.total ? factor.total : buffers.sums) + factor.at, buffers.sums_stride};
  }
  template <class Row>
  void take_sums(const ProductBuffers& buffers, int64_t m_rows, const Factor<Row>& factor) const {
    const Sums sums = sums_of(buffers, factor);
    if (static_cast<const void*>(sums.data) == factor.out) return;
    for (int64_t m = 0; m < m_rows; ++m)
      convert_row(factor.out + m * factor.columns, sums.data + m * sums.stride, factor.columns);
  }

  // Adds the products of rows [row, row + k) to a factor's sums, which may begin with them, for m_rows columns of a from `first` on.
  template <class Row>
  void add_products(const ProductBuffers& buffers, int64_t first, int64_t m_rows, int64_t row, int64_t k, bool begins,
                    const Factor<Row>& factor) const {
    const Panels& panels = factor.panels;
    using Pointer = decltype(factor.row(int64_t(0)));
    Pointer rows[K_BLOCK];
    for (int64_t i = 0; i < k; ++i) rows[i] = factor.row(row + i);
    // A few rows at a time, all panels of them, so that memory is read in order; the next rows are fetched meanwhile.
    constexpr int64_t GROUP = 8;
    for (int64_t i = 0; i < k; i += GROUP) {
      const int64_t n = min64(GROUP, k - i);
      for (int64_t next = i + n; next < min64(i + n + GROUP, k); ++next)
        for (int64_t j = 0; j < factor.columns; j += 64 / int64_t(sizeof(*rows[0]))) __builtin_prefetch(rows[next] + j);
      for (int64_t p = 0; p < panels.count(); ++p)
        pack_rows<O>(buffers.w + panel_offset<O>(panels, p, k) + i * panels.width(p) * V, panels.width(p),
                     [&](int64_t r) { return rows[i + r]; }, n, p * panels.vectors * V, factor.columns);
    }
    const Sums of_factor = sums_of(buffers, factor);
    const auto multiply = [&](int64_t p, int64_t m, int count) {
      T* const sums = of_factor.data + m * of_factor.stride + p * panels.vectors * V;
      const O* a[MAX_ROWS];
      const T* start[MAX_ROWS];
      for (int r = 0; r < count; ++r) {
        a[r] = buffers.a + (m + r) * buffers.a_stride;
        start[r] = begins ? ZEROS<O> : sums + r * of_factor.stride;
      }
      tile_function<O>(count, panels.width(p))(units<O>(k), a, buffers.w + panel_offset<O>(panels, p, k), start, 0, nullptr, sums,
                                               of_factor.stride, nullptr);
    };
    // All panels of a few rows, then the next rows: so the sums are written in their order in memory, which takes longer than the
    // products where k is small.
    for_tiles(m_rows, int(panels.vectors), [&](int64_t m, int count, int64_t, int64_t) {
      for (int64_t p = 0; p < panels.count(); ++p) multiply(p, first + m, count);
    });
  }

  // Of a weight, 0 for w_hh, 1 for w_ih and 2 for w_hr, the sums of its rows from `first` on.
  T* total(int weight, int64_t lane, int64_t first) const {
    const int64_t rows = weight == 2 ? s.state : gate_rows;
    return totals ? totals + (weight * s.lanes * gate_rows + lane * rows + first) * sum_columns() : nullptr;
  }

  void w_hh_gradient(int64_t task, char* local) const {
    const int64_t blocks = ceil_div(gate_rows, block_rows), lane = task / blocks, first = task % blocks * block_rows;
    StepOfRow step_of(s);
    const auto state_before = [&](int64_t row) {
      if (d.states) return static_cast<const S*>(d.states + (lane * s.rows + row) * s.state);
      const int64_t t = step_of(row), b = row - s.offset_at(t);
      return h_before<S>(x, lane, b, row_before(s, lane, t, b));
    };
    const int64_t end = min64(first + block_rows, gate_rows);
    const auto gates = [&](int64_t row) { return d.gates_h(lane, row); };
    const auto same = [](int64_t m) { return m; };
    const Bias bias = bias_of(0, lane, first, x.d_b_hh, s.cell == Cell::gru ? nullptr : x.d_b_ih);
    const Factor of_state{states, s.state, state_before, at<S>(x.d_w_hh, (lane * gate_rows + first) * s.state),
                          total(0, lane, first), 0};
    if (both_weights)
      product(lane, first, end, gates, same, gate_rows, bias, local, of_state,
              of_input(lane, first, total(0, lane, first), states.total_vectors * V));
    else
      product(lane, first, end, gates, same, gate_rows, bias, local, of_state);
  }
  auto of_input(int64_t lane, int64_t first, T* sums, int64_t at_column) const {
    const auto row = [this](int64_t k) { return at<S>(x.input, k * s.input); };
    return Factor{inputs, s.input, row, at<S>(x.d_w_ih, (lane * gate_rows + first) * s.input), sums, at_column};
  }

  void w_ih_gradient(int64_t task, char* local) const {
    const int64_t blocks = ceil_div(gate_rows, block_rows), lane = task / blocks, first = task % blocks * block_rows;
    product(lane, first, min64(first + block_rows, gate_rows), [&](int64_t row) { return d.gates_x(lane, row); },
            [&](int64_t m) { return d.column_x(m); }, d.permuted ? 2 * s.hidden : gate_rows,
            bias_of(1, lane, first, s.cell == Cell::gru ? x.d_b_ih : nullptr, nullptr), local,
            of_input(lane, first, total(1, lane, first), 0));
  }

  void w_hr_gradient(int64_t task, char* local) const {
    const int64_t blocks = ceil_div(s.state, block_rows), lane = task / blocks, first = task % blocks * block_rows;
    const auto unprojected = [&](int64_t row) { return static_cast<const O*>(d.unprojected_row(lane, row)); };
    product(lane, first, min64(first + block_rows, s.state), [&](int64_t row) { return d.state_row(lane, row); },
            [](int64_t m) { return m; }, gate_rows, Bias{}, local,
            Factor{units_, s.hidden, unprojected, at<S>(x.d_w_hr, (lane * s.state + first) * s.hidden), total(2, lane, first), 0});
  }

  // A segment sum over ids, transposed on the way out. A row has one id, so the sum over ids is the bias's (of the other
  // cells w_hh_gradient has it).
  void w_ids_gradient(int64_t task, char* local) const {
    const int64_t blocks = ceil_div(gate_rows, ID_COLUMNS), lane = task / blocks, first = task % blocks * ID_COLUMNS;
    const int64_t n = min64(ID_COLUMNS, gate_rows - first);
    Carver carver(local);
    const IdBuffers buffers(*this, task, carver);
    T* const sums = buffers.sums;
    if (d.is_first_part()) std::memset(sums, 0, size_t(2 * s.input * ID_COLUMNS) * sizeof(T));  // and what they have lost
    std::memset(buffers.counts, 0, size_t(s.input));
    const int64_t* ids = at<int64_t>(x.input, 0);
    // Too little of each row to be seen coming.
    constexpr int64_t FETCHED = 8;
    const auto rows = d.rows(lane);
    for (int64_t row = rows.first; row < rows.end; ++row) {
      if (row + FETCHED < rows.end)
        for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(O)))
          __builtin_prefetch(d.gates_x(lane, row + FETCHED) + d.column_x(first) + j);
      const int64_t id = ids[row];
      T* const block = buffers.blocks + id * ID_COLUMNS;
      if (!buffers.counts[id]) std::memset(block, 0, ID_COLUMNS * sizeof(T));
      add_columns(block, lane, row, first, n);
      if (++buffers.counts[id] < SUM_ROWS) continue;
      add_block(sums + id * ID_COLUMNS, buffers.lost + id * ID_COLUMNS, block, n);
      buffers.counts[id] = 0;
    }
    for (int64_t id = 0; id < s.input; ++id)
      if (buffers.counts[id])
        add_block(sums + id * ID_COLUMNS, buffers.lost + id * ID_COLUMNS, buffers.blocks + id * ID_COLUMNS, n);
    if (!d.is_last_part()) return;
    for (int64_t m = 0; m < n; ++m) {
      S* out = at<S>(x.d_w_ih, (lane * gate_rows + first + m) * s.input);
      T sum{};
      for (int64_t id = 0; id < s.input;) {
        T block{};
        for (const int64_t end = min64(id + SUM_ROWS, s.input); id < end; ++id) {
          store_one(out + id, sums[id * ID_COLUMNS + m]);
          block += sums[id * ID_COLUMNS + m];
        }
        sum += block;
      }
      if (s.cell == Cell::gru && x.d_b_ih) store_one(at<S>(x.d_b_ih, lane * gate_rows + first + m), sum);
    }
  }

  // sums[m] += d_gates_x[row, column_x(first + m)]
  void add_columns(T* sums, int64_t lane, int64_t row, int64_t first, int64_t n) const {
    const O* gates = d.gates_x(lane, row);
    for (int64_t m = 0; m < n;) {
      const int64_t boundary = d.permuted && first + m < 2 * s.hidden ? 2 * s.hidden : gate_rows;
      const int count = int(min64(V, min64(n - m, boundary - first - m)));
      const auto sum = load(sums + m, count) + load(gates + d.column_x(first + m), count);
      store(sums + m, sum, count);
      m += count;
    }
  }

  void bias_gradient(int64_t task, char* local) const {
    const int64_t blocks = ceil_div(gate_rows, SUM_COLUMNS), lane = task / blocks, first = task % blocks * SUM_COLUMNS;
    const int64_t n = min64(SUM_COLUMNS, gate_rows - first);
    const bool both = s.cell != Cell::gru;
    const Bias of_input = bias_of(1, lane, first, x.d_b_ih, both ? x.d_b_hh : nullptr);
    const Bias of_state = bias_of(0, lane, first, x.d_b_hh, nullptr);
    const auto sum = [&](const Bias& bias, auto add) {
      begin_bias(bias, SUM_COLUMNS);
      add_rows(bias.sums, bias.lost, reinterpret_cast<T*>(local), n, d.rows(lane).first, d.rows(lane).end, add);
      end_bias(bias, n);
    };
    sum(of_input, [&](T* block, int64_t row) { add_columns(block, lane, row, first, n); });
    if (both) return;
    sum(of_state, [&](T* block, int64_t row) {
      const O* gates = d.gates_h(lane, row) + first;
      for (int64_t m = 0; m < n; m += V) {
        const int count = int(min64(V, n - m));
        store(block + m, load(block + m, count) + load(gates + m, count), count);
      }
    });
  }

  static void store_one(S* to, T value) {
    if constexpr (sizeof(S) == sizeof(T))
      *to = value;
    else
      store(to, splat(value), 1);
  }
};

}  // namespace rnnfast::RNNFAST_ISA
