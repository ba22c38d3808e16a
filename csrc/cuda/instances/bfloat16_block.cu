#include "../instance.cuh"

namespace rnnfast::cuda {
RNNFAST_SCAN_INSTANCE(BFloat16, BlockExchange)
}
