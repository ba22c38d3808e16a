#include "../instance.cuh"

namespace rnnfast::cuda {
RNNFAST_SCAN_INSTANCE(Tf32, BlockExchange)
}
