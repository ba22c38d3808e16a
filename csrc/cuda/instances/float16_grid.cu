#include "../instance.cuh"

namespace rnnfast::cuda {
RNNFAST_SCAN_INSTANCE(Float16, GridExchange)
}
