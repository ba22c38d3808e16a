#include "../instance.cuh"

namespace rnnfast::cuda {
RNNFAST_STEP_INSTANCE(Float32)
RNNFAST_STEP_INSTANCE(Float64)
RNNFAST_STEP_INSTANCE(BFloat16)
RNNFAST_STEP_INSTANCE(Float16)
}
