// Compiled once for each instruction set, with RNNFAST_ISA its name: see rnnfast/backends/native.py.
#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "weights.h"

#define RNNFAST_STRING_(x) #x
#define RNNFAST_STRING(x) RNNFAST_STRING_(x)

namespace rnnfast::RNNFAST_ISA {

#if defined(__AVX512BF16__)
using HalfOperand = bf16;
#else
using HalfOperand = float;
#endif

// Runs this thread's share of the items: all of one team's, or every n-th alone.
template <class Scan, class Local>
void run_items(const Scan& scan, const ScanShape& s, const Split& split, Local& local, int thread, int threads,
               Barrier& team) {
  local.member = split.together() ? thread : 0;
  local.members = split.together() ? threads : 1;
  for (int64_t i = split.together() ? 0 : thread; i < split.items; i += split.together() ? 1 : threads)
    scan.run_item(item_of(s, split, i), local, team);
}

template <class S, class O>
void forward(const ForwardArgs& x, int available) {
  const ScanShape& s = x.shape;
  const PackedLayer<S, O> sizes(s, nullptr);
  const Split split = split_work(s, sizes.gates.total_vectors * units<O>(s.state), sizes.gates.count(), available);
  const Scratch packed_memory(sizes.bytes);
  const PackedLayer<S, O> packed(s, packed_memory.data());
  Forward<S, O> scan(x, packed, split);
  Carver shared(nullptr), own(nullptr);
  scan.carve(shared);
  scan.carve_local(own);
  const Scratch memory(shared.used() + own.used() * split.threads);
  Carver carver(memory.data());
  scan.carve(carver);
  Barrier all, team;
  parallel(split.threads, [&](int thread, int threads) {
    Carver mine(memory.data() + shared.used() + own.used() * thread);
    auto local = scan.carve_local(mine);
    packed.pack(x, thread, threads);
    all.wait(threads);
    run_items(scan, s, split, local, thread, threads, team);
  });
}

template <class S, class O>
void backward(const BackwardArgs& x, int available) {
  const ScanShape& s = x.shape;
  const Panels panels = plain_panels(s.state, LANES<O>);
  const Split split = split_work(s, panels.total_vectors * units<O>(s.gates() * s.hidden), panels.count(), available);
  Gradients<S, O> gradients(s);
  Backward<S, O> scan(x, split, gradients);
  WeightGradients<S, O> weights(x, gradients, split.threads);
  Carver shared(nullptr), own(nullptr);
  gradients.carve(shared);
  scan.carve(shared);
  weights.carve(shared);
  scan.carve_local(own);
  const size_t own_bytes = own.used() > weights.local_bytes() ? own.used() : weights.local_bytes();
  const Scratch memory(shared.used() + own_bytes * split.threads);
  Carver carver(memory.data());
  gradients.carve(carver);
  scan.carve(carver);
  weights.carve(carver);
  const int64_t tasks = weights.tasks();
  std::atomic<int64_t> next{0};
  Barrier all, team;
  parallel(split.threads, [&](int thread, int threads) {
    char* mine = memory.data() + shared.used() + own_bytes * thread;
    scan.pack(thread, threads);
    weights.pack(thread, threads);
    all.wait(threads);
    Carver scan_memory(mine);
    auto local = scan.carve_local(scan_memory);
    run_items(scan, s, split, local, thread, threads, team);
    all.wait(threads);
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) weights.run(task, mine);
  });
}

template <class Args, void (*F32_)(const Args&, int), void (*F64_)(const Args&, int), void (*BF16_)(const Args&, int)>
void by_dtype(const Args& x, int available) {
  switch (x.shape.dtype) {
    case DType::float32: return F32_(x, available);
    case DType::float64: return F64_(x, available);
    case DType::bfloat16: return BF16_(x, available);
  }
}

extern const Kernels kernels;
const Kernels kernels{
    RNNFAST_STRING(RNNFAST_ISA),
#if defined(__AVX512BF16__)
    // Only what differs from plain AVX-512.
    nullptr, nullptr, forward<bf16, bf16>, backward<bf16, bf16>,
#else
    by_dtype<ForwardArgs, forward<float, float>, forward<double, double>, forward<bf16, float>>,
    by_dtype<BackwardArgs, backward<float, float>, backward<double, double>, backward<bf16, float>>,
    nullptr, nullptr,
#endif
};

}  // namespace rnnfast::RNNFAST_ISA
