// Stands in for the instances that the library with the race detector goes without, so that it is quickly compiled.
#include <stdexcept>

#include "launch.h"

namespace rnnfast::cuda {

template <class M, template <class> class X>
void run_scan(Cell, bool, const LaunchShape&, const ScanParams&, void*) {
  throw std::logic_error("this instance is not built");
}
template <class M>
void run_step(Cell, bool, const LaunchShape&, const StepParams&, void*) {
  throw std::logic_error("this instance is not built");
}

#define RNNFAST_ABSENT(M, X) template void run_scan<M, X>(Cell, bool, const LaunchShape&, const ScanParams&, void*);
RNNFAST_ABSENT(Tf32, BlockExchange)
RNNFAST_ABSENT(Tf32, ClusterExchange)
RNNFAST_ABSENT(Tf32, GridExchange)
RNNFAST_ABSENT(Float16, BlockExchange)
RNNFAST_ABSENT(Float16, ClusterExchange)
RNNFAST_ABSENT(Float16, GridExchange)
RNNFAST_ABSENT(Float64, BlockExchange)
RNNFAST_ABSENT(Float64, GridExchange)
template void run_step<Float32>(Cell, bool, const LaunchShape&, const StepParams&, void*);
template void run_step<Float64>(Cell, bool, const LaunchShape&, const StepParams&, void*);
template void run_step<BFloat16>(Cell, bool, const LaunchShape&, const StepParams&, void*);
template void run_step<Float16>(Cell, bool, const LaunchShape&, const StepParams&, void*);

}  // namespace rnnfast::cuda
