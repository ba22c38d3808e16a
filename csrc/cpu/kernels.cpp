// Compiled once for each instruction set, with RNNFAST_ISA its name: see rnnfast/backends/cpu/build.py.
#include "kernels.h"

#include "backward.h"
#include "extended.h"
#include "extended_backward.h"
#include "forward.h"
#include "lm/head.h"
#include "weight_gradients.h"
#if !defined(__AVX512BF16__)
#include "lm/cross_entropy.h"
#endif
#include "limit_kernels.h"

namespace rnnfast::RNNFAST_ISA {

// Runs this thread's share of the items: all of one team's, or every n-th alone and then what others give away.
template <class Scan, class Local>
void run_items(const Scan& scan, const ScanShape& s, const Split& split, Local& local, int thread, int threads,
               Team& team) {
  local.member = split.together() ? thread : 0;
  local.members = split.together() ? threads : 1;
  for (int64_t i = split.together() ? 0 : thread; i < split.items; i += split.together() ? 1 : threads)
    scan.run_item(item_of(s, split, i), local, team);
  if (!team.relay) return;
  for (Item item; team.relay->take(item, threads);) scan.run_item(item, local, team);
}

// The threads that packing into so many bytes is worth.
template <class O>
int threads_of_packing(size_t bytes, int available) {
  return worth_threads(available, 2 * int64_t(bytes / sizeof(O)));
}

// A forward scan, in memory for the length of the call. Weights that are not packed yet are first, each thread's share of them by
// pack(thread, threads): a short scan is walked by fewer threads than packing is worth.
template <class Scan, class Pack>
void run_forward(Scan& scan, const ScanShape& s, const Split& split, bool is_packed, int packing_threads, Pack pack) {
  Carver shared(nullptr), own(nullptr);
  scan.carve(shared);
  scan.carve_local(own);
  const Scratch memory(shared.used() + own.used() * split.threads);
  Carver carver(memory.data());
  scan.carve(carver);
  if (!is_packed && packing_threads > split.threads) {
    parallel(packing_threads, pack);
    is_packed = true;
  }
  Barrier all;
  Team team = team_of(split, scan);
  parallel(split.threads, [&](int thread, int threads) {
    Carver mine(memory.data() + shared.used() + own.used() * thread);
    auto local = scan.carve_local(mine);
    if (!is_packed) {
      pack(thread, threads);
      all.wait(threads);
    }
    run_items(scan, s, split, local, thread, threads, team);
  });
}

template <class S, class O>
void forward(const ForwardArgs& x, int available) {
  const ScanShape& s = x.shape;
  const PackedLayer<S, O> sizes(s, nullptr, x.packed);
  const Split split = split_work(s, sizes.gates.total_vectors * units<O>(s.state), sizes.gates.count(), available,
                                 s.batch / LEAST_GROUP, x.beside);
  const Scratch packed_memory(x.packed ? 0 : sizes.bytes);
  const PackedLayer<S, O> packed(s, x.packed ? static_cast<char*>(x.packed) : packed_memory.data(), x.packed);
  Forward<S, O> scan(x, packed, split);
  run_forward(scan, s, split, x.packed, threads_of_packing<O>(sizes.bytes, available),
              [&](int thread, int threads) { packed.pack(x, thread, threads); });
}

template <class S>
void generate(const ForwardArgs* layers, int64_t count, const HeadArgs& head_args, int available, bool (*next)(void*),
              void* context) {
  const Split split = available > 1 ? Split{available, available, 0, 1} : Split{1, 1, 1, 1};
  Carver shared(nullptr), own(nullptr);
  for (int64_t l = 0; l < count; ++l) {
    const PackedLayer<S, S> packed(layers[l].shape, static_cast<char*>(layers[l].packed), true);
    Forward<S, S> scan(layers[l], packed, split);
    scan.carve(shared);
    scan.carve_local(own);
  }
  const Scratch memory(shared.used() + own.used() * split.threads);
  bool more = true;
  Team team;
  parallel(split.threads, [&](int thread, int members) {
    do {
      Carver carver(memory.data()), mine(memory.data() + shared.used() + own.used() * thread);
      for (int64_t l = 0; l < count; ++l) {
        const PackedLayer<S, S> packed(layers[l].shape, static_cast<char*>(layers[l].packed), true);
        Forward<S, S> scan(layers[l], packed, split);
        scan.carve(carver);
        auto local = scan.carve_local(mine);
        run_items(scan, layers[l].shape, split, local, thread, members, team);  // ends with all of its output written
        if (!team.is_dissolved()) continue;
        if (thread > 0) return;
        members = 1;
      }
      head(head_args, thread, members);
      team.barrier.wait(members, [&] { more = next(context); });
    } while (more);
  });
}

// Packs the weights to be kept at x.packed, or says how many bytes that takes if it is null.
template <class S, class O>
size_t pack(const ForwardArgs& x, int available) {
  const PackedLayer<S, O> packed(x.shape, static_cast<char*>(x.packed), true);
  if (x.packed)
    parallel(threads_of_packing<O>(packed.bytes, available), [&](int thread, int threads) { packed.pack(x, thread, threads); });
  return packed.bytes;
}

RNNFAST_INLINE size_t max_of(size_t a) { return a; }
template <class... More>
RNNFAST_INLINE size_t max_of(size_t a, More... more) {
  const size_t b = max_of(more...);
  return a > b ? a : b;
}

// Cycles that the products behind a backward scan take one thread.
template <class O>
int64_t cycles_of_gradients(const BackwardArgs& x) {
  const ScanShape& s = x.shape;
  const int64_t of_input = s.ids ? 0 : (x.d_w_ih ? s.input : 0) + (x.d_input ? s.input : 0);
  return s.rows * s.gates() * s.hidden * (of_input + (x.d_w_hh ? s.state : 0)) / (2 * LANES<O>);
}

// The threads for them behind a scan: they can be shared by more than walk through time.
template <class O>
int threads_of_gradients(const BackwardArgs& x, const Split& split, int available) {
  const int64_t cycles = cycles_of_gradients<O>(x);
  return cycles / split.threads - cycles / available > region_cycles() ? available : split.threads;
}

// A backward scan, or a part of it, and behind it the tasks of the gradients that are parallel in time, which so many threads take as
// they come free, the last of them once the others are done. `locals`: own_bytes for each thread.
template <class Scan, class Input, class Task>
void scan_then_tasks(const Scan& scan, const Input& input, const ScanShape& s, const Split& split, bool is_packed, char* locals,
                     size_t own_bytes, int task_threads, int64_t tasks, Task run) {
  const int64_t last_tasks = input.last_tasks();
  std::atomic<int64_t> next{0}, next_of_last{tasks - last_tasks};
  Barrier all;
  Team team = team_of(split, scan);
  const auto run_tasks = [&](int threads, char* mine) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks - last_tasks;) run(task, mine);
    if (last_tasks == 0) return;
    all.wait(threads);
    for (int64_t task; (task = next_of_last.fetch_add(1)) < tasks;) run(task, mine);
  };
  parallel(split.threads, [&](int thread, int threads) {
    char* mine = locals + own_bytes * thread;
    if (!is_packed) {
      scan.pack(thread, threads);
      input.pack(thread, threads);
      all.wait(threads);
    }
    Carver scan_memory(mine);
    auto local = scan.carve_local(scan_memory);
    run_items(scan, s, split, local, thread, threads, team);
    if (task_threads != split.threads) return;
    all.wait(threads);
    run_tasks(threads, mine);
  });
  if (task_threads == split.threads) return;
  parallel(task_threads, [&](int thread, int threads) { run_tasks(threads, locals + own_bytes * thread); });
}

template <class S, class O>
void backward(const BackwardArgs& x, int available) {
  const ScanShape& s = x.shape;
  const Panels panels = Backward<S, O>::panels_of(x);
  const Split split = split_work(s, panels.total_vectors * units<O>(s.gates() * s.hidden), panels.count(), available,
                                 s.batch / LEAST_GROUP);
  Gradients<S, O> gradients(s, false, x.gates);
  Backward<S, O> scan(x, split, gradients);
  const int task_threads = threads_of_gradients<O>(x, split, available);
  WeightGradients<S, O> weights(x, gradients, task_threads);
  gradients.cut(weights.parts());
  InputGradient<S, O> input(x, gradients, task_threads);
  Carver shared(nullptr), own(nullptr);
  gradients.carve(shared);
  scan.carve(shared);
  weights.carve(shared);
  input.carve(shared);
  scan.carve_local(own);
  const size_t own_bytes = max_of(own.used(), weights.local_bytes(), input.local_bytes());
  const Scratch memory(shared.used() + own_bytes * size_t(task_threads));
  Carver carver(memory.data());
  gradients.carve(carver);
  scan.carve(carver);
  weights.carve(carver);
  input.carve(carver);
  const int64_t of_weights = weights.tasks();
  for (int64_t i = gradients.parts - 1; i >= 0; --i) {
    const Part part = part_of(s, i, gradients.parts);
    if (part.steps() == 0) continue;
    gradients.go_to(part);
    input.begin_part();
    scan_then_tasks(scan, input, s, split, !gradients.is_first_part(), memory.data() + shared.used(), own_bytes,
                    task_threads, of_weights + input.tasks(), [&](int64_t task, char* mine) {
                      if (task < of_weights)
                        weights.run(task, mine);
                      else
                        input.run(task - of_weights, mine);
                    });
  }
}

// The gradients of weights and biases, from those of the gates of rows that are one step, with states before it in h_0.
template <class S, class O>
void weight_gradients(const BackwardArgs& x, int available) {
  const int threads = worth_threads(available, cycles_of_gradients<O>(x));
  const Gradients<S, O> gradients(x.shape, false, x.gates);
  WeightGradients<S, O> weights(x, gradients, threads);
  Carver shared(nullptr);
  weights.carve(shared);
  const size_t own_bytes = weights.local_bytes();
  const Scratch memory(shared.used() + own_bytes * size_t(threads));
  Carver carver(memory.data());
  weights.carve(carver);
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread, int) {
    char* const mine = memory.data() + shared.used() + own_bytes * size_t(thread);
    for (int64_t task; (task = next.fetch_add(1)) < weights.tasks();) weights.run(task, mine);
  });
}

// Packs w_hh, or w_ih if that is given, for many calls of such a shape; or where there is no place yet, returns the bytes that it
// takes, 0 if it is not worth it.
template <class S, class O>
size_t pack_backward(const BackwardArgs& x, int available) {
  const Split alone{1, 1, 1, 1};
  const Gradients<S, O> gradients(x.shape);
  const Backward<S, O> scan(x, alone, gradients);
  const InputGradient<S, O> input(x, gradients, 1);
  const int64_t count = x.w_ih ? input.packed_count() : scan.packed_count(), bytes = count * int64_t(sizeof(O));
  if (!x.packed_hh && !x.packed_ih) {
    // Rows that lie a power of two apart share few sets of the cache: each tile reads a matrix beyond it once more.
    const bool in_place = x.w_ih ? input.reads_in_place() : scan.reads_in_place();
    return in_place && bytes <= (x.shape.rows > 1 ? near_bytes() : ADDRESSED) ? 0 : size_t(bytes);
  }
  parallel(worth_threads(available, 2 * count), [&](int thread, int threads) {
    if (x.w_ih)
      input.pack_ih(thread, threads);
    else
      scan.pack_hh(thread, threads);
  });
  return size_t(bytes);
}

// Bytes of the gradients of the gates of a row, as they are kept.
template <class S, class O>
size_t gates_bytes(const ScanShape& s) {
  return size_t(Gradients<S, O>(s).stride) * sizeof(O);
}

template <class S, class O>
void extended_forward(const ExtendedForwardArgs& x, int available) {
  const ScanShape& s = x.scan.shape;
  const Panels panels = ExtendedForward<S, O>::panels_of(s);
  const Split split = split_work(s, panels.total_vectors * units<O>(s.state), panels.count(), available);
  ExtendedForward<S, O> scan(x, split);
  Carver weights(nullptr);
  scan.carve_weights(weights);
  run_forward(scan, s, split, x.scan.packed, threads_of_packing<O>(weights.used(), available),
              [&](int thread, int threads) { scan.pack(thread, threads); });
}

template <class S, class O>
size_t extended_pack(const ExtendedForwardArgs& x, int available) {
  const Split alone{1, 1, 1, 1};
  ExtendedForward<S, O> scan(x, alone);
  Carver carver(static_cast<char*>(x.scan.packed));
  scan.carve_weights(carver);
  if (x.scan.packed)
    parallel(threads_of_packing<O>(carver.used(), available), [&](int thread, int threads) { scan.pack(thread, threads); });
  return carver.used();
}

template <class S, class O>
void extended_backward(const ExtendedBackwardArgs& x, int available) {
  const ScanShape& s = x.scan.shape;
  const Panels panels = ExtendedBackward<S, O>::panels_of(s);
  const Split split = split_work(s, panels.total_vectors * units<O>(s.gates() * s.hidden), panels.count(), available);
  ExtendedBackward<S, O> scan(x, split);
  // Biases are added behind a normalisation, so the gradients they come from are not those of the products.
  BackwardArgs products = x.scan, biases = x.scan;
  products.d_b_ih = products.d_b_hh = nullptr;
  biases.d_input = biases.d_w_ih = biases.d_w_hh = biases.d_w_hr = nullptr;
  const int task_threads = threads_of_gradients<O>(products, split, available);
  WeightGradients<S, O> weights(products, scan.of_products(), task_threads), shifts(biases, scan.gates, task_threads);
  InputGradient<S, O> input(products, scan.of_products(), task_threads);
  Carver shared(nullptr), own(nullptr);
  scan.carve(shared);
  weights.carve(shared);
  shifts.carve(shared);
  input.carve(shared);
  scan.carve_local(own);
  const size_t own_bytes =
      max_of(own.used(), weights.local_bytes(), shifts.local_bytes(), input.local_bytes(), scan.task_bytes());
  const Scratch memory(shared.used() + own_bytes * size_t(task_threads));
  Carver carver(memory.data());
  scan.carve(carver);
  weights.carve(carver);
  shifts.carve(carver);
  input.carve(carver);
  const int64_t of_shifts = shifts.tasks(), of_scan = scan.tasks(), of_weights = weights.tasks();
  scan_then_tasks(scan, input, s, split, false, memory.data() + shared.used(), own_bytes, task_threads,
                  of_shifts + of_scan + of_weights + input.tasks(), [&](int64_t task, char* mine) {
                    if (task < of_shifts) return shifts.run(task, mine);
                    task -= of_shifts;
                    if (task < of_scan) return scan.run(task, mine);
                    task -= of_scan;
                    if (task < of_weights) return weights.run(task, mine);
                    input.run(task - of_weights, mine);
                  });
}

#if !defined(__AVX512BF16__)
void descend(float* values, const float* gradients, int64_t count, float rate) {
  constexpr int V = LANES<float>;
  for (int64_t i = 0; i < count; i += V) {
    const int n = int(count - i < V ? count - i : V);
    store(values + i, fma(splat(-rate), load(gradients + i, n), load(values + i, n)), n);
  }
}

void widen_all(float* wide, void* half, int64_t count) { convert_row(wide, static_cast<const bf16*>(half), count); }
void narrow_all(float* wide, void* half, int64_t count) { convert_row(static_cast<bf16*>(half), wide, count); }
#endif

// f(S{}, O{}) for the types of a tensor's elements and of its products' operands.
template <class F>
auto by_types([[maybe_unused]] DType dtype, F f) {
#if defined(__AVX512BF16__)
  return f(bf16{}, bf16{});  // what the processor's bfloat16 product makes different from plain AVX-512
#else
  switch (dtype) {
    case DType::float32: return f(float{}, float{});
    case DType::float64: return f(double{}, double{});
    default: return f(bf16{}, float{});
  }
#endif
}
// NAME<S, O>(x) or NAME<S, O>(x, threads), for the types that x tells.
#define RNNFAST_BY_TYPES(NAME, DTYPE)                                                                          \
  [](const auto& x, auto... threads) {                                                                         \
    return by_types(DTYPE, [&](auto s, auto o) { return NAME<decltype(s), decltype(o)>(x, threads...); });     \
  }

#if defined(__AMX_BF16__)
constexpr MatrixUnit unit{multiply_pieces, near_pieces};
#endif

extern const Kernels kernels;
const Kernels kernels{
    RNNFAST_BY_TYPES(forward, x.shape.dtype),
    RNNFAST_BY_TYPES(backward, x.shape.dtype),
    RNNFAST_BY_TYPES(pack, x.shape.dtype),
    RNNFAST_BY_TYPES(weight_gradients, x.shape.dtype),
    RNNFAST_BY_TYPES(pack_backward, x.shape.dtype),
    RNNFAST_BY_TYPES(gates_bytes, x.dtype),
    RNNFAST_BY_TYPES(extended_forward, x.scan.shape.dtype),
    RNNFAST_BY_TYPES(extended_backward, x.scan.shape.dtype),
    RNNFAST_BY_TYPES(extended_pack, x.scan.shape.dtype),
#if defined(__AVX512BF16__)
    nullptr,  // generation is in float32 or float64
    nullptr,  // the loss is in float32
    nullptr,  // and so is descent
    nullptr,  // copies are made by the set of float32
    nullptr,
    nullptr,  // the limits are told in float32
    nullptr,
    nullptr,
#if defined(__AMX_BF16__)
    &unit,
#else
    nullptr,
#endif
#else
    [](const ForwardArgs* layers, int64_t count, const HeadArgs& head, int threads, bool (*next)(void*), void* context) {
      const auto run = head.dtype == DType::float64 ? generate<double> : generate<float>;
      run(layers, count, head, threads, next, context);
    },
    [](const LossArgs& x, const LossGradients* d, int threads) { return LinearCrossEntropy(x, d).run(threads); },
    descend,
    widen_all,
    narrow_all,
    near_product,
    read_weights,
    near_gates,
    nullptr,
#endif
};
#undef RNNFAST_BY_TYPES

}  // namespace rnnfast::RNNFAST_ISA
