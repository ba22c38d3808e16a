// What the library needs of the CUDA runtime; the emulated library of the tests has its own.
#pragma once

#include "plan.h"

namespace rnnfast::cuda {

DeviceLimits device_limits(int device);  // which is the current one
void* current_stream(int device);

}  // namespace rnnfast::cuda
