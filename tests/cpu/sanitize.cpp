// The native scan without torch, for the sanitizers: every cell, type and odd shape on blocks of exactly the size of
// each tensor. Prints nothing and returns 0 where all is well.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace rnnfast;

namespace {

// A malloc of its own for each tensor, so that a read or write past its end is seen.
struct Tensor {
  std::unique_ptr<char, void (*)(void*)> block{nullptr, std::free};
  int64_t count = 0;
  DType dtype = DType::float32;
  void* data() const { return block.get(); }
};

size_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

double get(const Tensor& tensor, int64_t i) {
  if (tensor.dtype == DType::float64) return reinterpret_cast<const double*>(tensor.data())[i];
  if (tensor.dtype == DType::float32) return reinterpret_cast<const float*>(tensor.data())[i];
  const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(tensor.data())[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void set(Tensor& tensor, int64_t i, double value) {
  if (tensor.dtype == DType::float64) {
    reinterpret_cast<double*>(tensor.data())[i] = value;
  } else if (tensor.dtype == DType::float32) {
    reinterpret_cast<float*>(tensor.data())[i] = float(value);
  } else {
    const float single = float(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    reinterpret_cast<uint16_t*>(tensor.data())[i] = uint16_t(bits >> 16);
  }
}

// Outputs start as NaN, so that an element left out is seen.
Tensor make(DType dtype, int64_t count, bool random) {
  static uint64_t state = 1;
  Tensor tensor;
  tensor.count = count;
  tensor.dtype = dtype;
  tensor.block.reset(static_cast<char*>(std::malloc(size_t(count) * size_of(dtype))));
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    set(tensor, i, random ? (double(state >> 40) / (1 << 24) - 0.5) * 0.4 : NAN);
  }
  return tensor;
}

void require_finite(const Tensor& tensor, const char* name) {
  for (int64_t i = 0; i < tensor.count; ++i)
    if (!std::isfinite(get(tensor, i))) {
      std::fprintf(stderr, "%s[%ld] is not finite\n", name, long(i));
      std::exit(1);
    }
}

void run(Cell cell, DType dtype, int64_t lanes, int64_t steps, int64_t batch, int64_t inputs, int64_t hidden,
         int64_t projected, bool ids, bool ragged, int threads) {
  ScanShape s{};
  s.lanes = lanes, s.steps = steps, s.batch = batch, s.input = inputs, s.hidden = hidden;
  s.state = projected ? projected : hidden;
  s.has_projection = projected > 0;
  s.cell = cell, s.dtype = dtype, s.bidirectional = lanes > 1, s.ids = ids;
  std::vector<int64_t> sizes, offsets;
  for (int64_t t = 0; t < steps; ++t) {
    sizes.push_back(ragged ? (batch > t ? batch - t : 1) : batch);
    offsets.push_back(s.rows);
    s.rows += sizes.back();
  }
  if (ragged) s.batch_sizes = sizes.data(), s.offsets = offsets.data();
  std::vector<int64_t> tokens(s.rows);
  for (int64_t i = 0; i < s.rows; ++i) tokens[i] = i * 7 % inputs;

  const int64_t G = s.gates() * hidden, K = tape_count(cell) * hidden, states = lanes * batch;
  const auto input = make(dtype, ids ? 0 : s.rows * inputs, true), w_ih = make(dtype, lanes * G * inputs, true);
  const auto w_hh = make(dtype, lanes * G * s.state, true), b_ih = make(dtype, lanes * G, true);
  const auto b_hh = make(dtype, lanes * G, true), w_hr = make(dtype, lanes * projected * hidden, true);
  const auto h_0 = make(dtype, states * s.state, true), c_0 = make(dtype, states * hidden, true);
  const auto output = make(dtype, s.rows * lanes * s.state, false), h_n = make(dtype, states * s.state, false);
  const auto c_n = make(dtype, states * hidden, false), tape = make(dtype, lanes * s.rows * K, false);
  const bool lstm = cell == Cell::lstm;
  const auto if_projected = [&](const Tensor& t) { return projected ? t.data() : nullptr; };
  ForwardArgs forward{s, ids ? static_cast<void*>(tokens.data()) : input.data(), w_ih.data(), w_hh.data(), b_ih.data(),
                      b_hh.data(), if_projected(w_hr), h_0.data(), lstm ? c_0.data() : nullptr, output.data(), h_n.data(),
                      lstm ? c_n.data() : nullptr, K ? tape.data() : nullptr, nullptr};
  const Kernels& kernels = choose_kernels(dtype);
  kernels.forward(forward, threads);
  require_finite(output, "output");
  require_finite(h_n, "h_n");
  require_finite(tape, "tape");
  if (lstm) require_finite(c_n, "c_n");

  const auto packed = std::unique_ptr<char, void (*)(void*)>(
      static_cast<char*>(std::aligned_alloc(64, (kernels.pack(forward, 1) + 63) / 64 * 64)), std::free);
  forward.packed = packed.get();
  kernels.pack(forward, 2);
  kernels.forward(forward, threads);

  const auto cells = make(dtype, lanes * s.rows * hidden, true);
  const auto d_input = make(dtype, ids ? 0 : input.count, false), d_w_ih = make(dtype, w_ih.count, false);
  const auto d_w_hh = make(dtype, w_hh.count, false), d_b_ih = make(dtype, lanes * G, false);
  const auto d_b_hh = make(dtype, lanes * G, false), d_w_hr = make(dtype, w_hr.count, false);
  const auto d_h_0 = make(dtype, h_0.count, false), d_c_0 = make(dtype, c_0.count, false);
  const BackwardArgs backward{s, output.data(), h_n.data(), lstm ? c_n.data() : nullptr, forward.input, w_ih.data(),
                              w_hh.data(), b_ih.data(), b_hh.data(), if_projected(w_hr), h_0.data(),
                              lstm ? c_0.data() : nullptr, output.data(), tape.data(), ids ? nullptr : d_input.data(),
                              d_w_ih.data(), d_w_hh.data(), d_b_ih.data(), d_b_hh.data(), if_projected(d_w_hr),
                              d_h_0.data(), lstm ? d_c_0.data() : nullptr, lstm ? cells.data() : nullptr};
  kernels.backward(backward, threads);
  require_finite(d_input, "d_input");
  require_finite(d_w_ih, "d_w_ih");
  require_finite(d_w_hh, "d_w_hh");
  require_finite(d_b_ih, "d_b_ih");
  require_finite(d_b_hh, "d_b_hh");
  require_finite(d_h_0, "d_h_0");
  if (projected) require_finite(d_w_hr, "d_w_hr");
  if (lstm) require_finite(d_c_0, "d_c_0");

  if (lanes == 1 && !projected) {
    // As in a loop of calls: the gradients of weights behind it, from those of the gates that it leaves.
    const auto bytes = (size_t(s.rows) * kernels.gates_bytes(s) + 63) / 64 * 64;
    const auto gates =
        std::unique_ptr<char, void (*)(void*)>(static_cast<char*>(std::aligned_alloc(64, bytes)), std::free);
    const auto states_before = make(dtype, s.rows * hidden, true);
    const auto panels = [&](bool of_input) {
      BackwardArgs pack{};
      pack.shape = s;
      (of_input ? pack.w_ih : pack.w_hh) = of_input ? w_ih.data() : w_hh.data();
      const size_t size = kernels.pack_backward(pack, threads);
      std::unique_ptr<char, void (*)(void*)> place(
          size ? static_cast<char*>(std::aligned_alloc(64, (size + 63) / 64 * 64)) : nullptr, std::free);
      (of_input ? pack.packed_ih : pack.packed_hh) = place.get();
      if (size) kernels.pack_backward(pack, threads);
      return place;
    };
    const auto packed_hh = panels(false), packed_ih = panels(true);
    BackwardArgs first = backward, second{};
    first.packed_hh = packed_hh.get(), first.packed_ih = packed_ih.get();
    first.d_w_ih = first.d_w_hh = first.d_b_ih = first.d_b_hh = nullptr;
    first.gates = second.gates = gates.get();
    kernels.backward(first, threads);
    const auto e_w_ih = make(dtype, w_ih.count, false), e_w_hh = make(dtype, w_hh.count, false);
    const auto e_b_ih = make(dtype, G, false), e_b_hh = make(dtype, G, false);
    second.shape = s;
    second.shape.steps = 1, second.shape.batch = s.rows;
    second.shape.batch_sizes = second.shape.offsets = nullptr;
    second.input = forward.input, second.h_0 = states_before.data();
    second.d_w_ih = e_w_ih.data(), second.d_w_hh = e_w_hh.data();
    second.d_b_ih = e_b_ih.data(), second.d_b_hh = e_b_hh.data();
    kernels.weight_gradients(second, threads);
    for (const auto* d : {&e_w_ih, &e_w_hh, &e_b_ih, &e_b_hh}) require_finite(*d, "gradient from gates");
  }

  // The same layer with an extended recurrence: dropout and a share of zoneout, masks of zoneout, or a normalisation.
  const auto mask = make(dtype, states * hidden, true), gains = make(dtype, lanes * G, true);
  const auto gains_c = make(dtype, lanes * hidden, true), peepholes = make(dtype, lanes * 3 * hidden, true);
  const auto d_peepholes = make(dtype, peepholes.count, false);
  std::vector<char> zones(size_t(lanes * s.rows * hidden));
  for (size_t i = 0; i < zones.size(); ++i) zones[i] = i % 3 == 0;
  const bool* flags = reinterpret_cast<const bool*>(zones.data());
  for (int kind = 0; kind < (s.gates() > 1 ? 3 : 2); ++kind) {
    Extension e{};
    if (kind != 1) e.recurrent_mask = mask.data();
    if (kind == 0) e.share_h = 0.25, e.share_c = lstm ? 0.5 : 0;
    if (kind != 0) e.zoneout_h = flags, e.zoneout_c = lstm ? flags : nullptr;
    if (kind == 2) e.gain_ih = e.gain_hh = gains.data();
    if (kind == 2 && lstm) e.gain_c = e.bias_c = gains_c.data(), e.peepholes = peepholes.data();
    const auto long_tape = make(dtype, lanes * s.rows * ExtendedTape(s, e).width, false);
    forward.packed = nullptr;
    forward.tape = long_tape.count ? long_tape.data() : nullptr;
    kernels.extended_forward({forward, e}, threads);
    require_finite(output, "extended output");
    require_finite(long_tape, "extended tape");
    const auto d_gains = make(dtype, 2 * lanes * G, false), d_gains_c = make(dtype, 2 * lanes * hidden, false);
    const auto behind = [&](const Tensor& both) {
      return static_cast<char*>(both.data()) + both.count / 2 * int64_t(size_of(dtype));
    };
    BackwardArgs reverse = backward;
    reverse.tape = long_tape.data();
    reverse.d_cells = nullptr;
    kernels.extended_backward({reverse, e, kind == 2 ? d_gains.data() : nullptr, kind == 2 ? behind(d_gains) : nullptr,
                               e.gain_c ? d_gains_c.data() : nullptr, e.gain_c ? behind(d_gains_c) : nullptr,
                               e.gain_c ? d_peepholes.data() : nullptr},
                              threads);
    for (const auto* d : {&d_input, &d_w_ih, &d_w_hh, &d_b_ih, &d_b_hh, &d_h_0}) require_finite(*d, "extended gradient");
    if (projected) require_finite(d_w_hr, "extended d_w_hr");
    if (kind == 2) require_finite(d_gains, "d_gains");
    if (e.gain_c) require_finite(d_gains_c, "d_gains_c");
    if (e.gain_c) require_finite(d_peepholes, "d_peepholes");
  }
}

void run_cross_entropy(int64_t rows, int64_t columns, int64_t classes, bool biased, int threads) {
  const DType dtype = DType::float32;
  const auto hidden = make(dtype, rows * columns, true), weight = make(dtype, classes * columns, true);
  const auto bias = make(dtype, classes, true);
  const auto d_hidden = make(dtype, hidden.count, false), d_weight = make(dtype, weight.count, false);
  const auto d_bias = make(dtype, classes, false);
  std::vector<int64_t> targets(rows);
  for (int64_t i = 0; i < rows; ++i) targets[i] = i * 7 % classes;
  const auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.data()); };
  const LossArgs x{rows, columns, classes, floats(hidden), floats(weight), biased ? floats(bias) : nullptr, targets.data()};
  const LossGradients d{floats(d_hidden), floats(d_weight), floats(d_bias)};
  const Kernels& kernels = choose_kernels(dtype);
  const double loss = kernels.loss(x, &d, threads);
  if (!std::isfinite(loss) || kernels.loss(x, nullptr, threads) != loss) std::exit(1);
  require_finite(d_hidden, "d_hidden");
  require_finite(d_weight, "d_weight");
  require_finite(d_bias, "d_bias");
}

void run_descent(int64_t count) {
  const auto values = make(DType::float32, count, true), gradients = make(DType::float32, count, true);
  const auto half = make(DType::bfloat16, count, false);
  const Kernels& kernels = choose_kernels(DType::float32);
  kernels.descend(static_cast<float*>(values.data()), static_cast<const float*>(gradients.data()), count, 0.5f);
  kernels.narrow(static_cast<float*>(values.data()), half.data(), count);
  kernels.widen(static_cast<float*>(gradients.data()), half.data(), count);
  require_finite(values, "values");
  require_finite(half, "copies in bfloat16");
  require_finite(gradients, "copies in float32");
}

void run_kernels() {
  // The last but one has more gates than a block of the backward product, the last enough rows and columns for the matrix unit.
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1},    {2, 5, 3, 17, 33}, {1, 4, 7, 3, 130},
                               {3, 3, 20, 33, 16}, {1, 40, 1, 5, 70}, {1, 2, 9, 5, 520},
                               {1, 3, 33, 200, 196}};
  for (Cell cell : {Cell::rnn_tanh, Cell::rnn_relu, Cell::lstm, Cell::gru})
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16})
      for (const auto& shape : shapes)
        for (int variant = 0; variant < 4; ++variant) {
          const bool ids = variant & 1, ragged = variant & 2;
          run(cell, dtype, shape[0], shape[1], shape[2], shape[3], shape[4], 0, ids, ragged, 1);
          if (cell == Cell::lstm)
            run(cell, dtype, shape[0], shape[1], shape[2], shape[3], shape[4], (shape[4] + 1) / 2, ids, ragged, 1);
        }
  // Two threads that share rows, and pieces of a step.
  for (Cell cell : {Cell::lstm, Cell::gru})
    for (DType dtype : {DType::float32, DType::bfloat16})
      for (bool ragged : {false, true}) {
        run(cell, dtype, 1, 12, 40, 5, 40, 0, false, ragged, 2);
        run(cell, dtype, 2, 3, 21, 5, 520, 0, false, ragged, 2);
      }
  // Backward scans in several parts.
  for (bool ragged : {false, true}) {
    run(Cell::lstm, DType::float32, 1, 45, 80, 3, 130, 0, false, ragged, 2);
    run(Cell::lstm, DType::float32, 2, 45, 80, 3, 130, 40, false, ragged, 2);
    run(Cell::gru, DType::float64, 2, 45, 80, 3, 66, 0, true, ragged, 1);
  }
  for (int64_t classes : {1, 16, 28, 300})
    for (int64_t columns : {1, 33, 130}) {
      run_cross_entropy(1, columns, classes, false, 1);
      run_cross_entropy(150, columns, classes, true, 1);
    }
  run_cross_entropy(700, 70, 300, true, 2);
  for (int64_t count : {1, 16, 33, 1000}) run_descent(count);
}

}  // namespace

int main() {
  run_kernels();
  return 0;
}
