// How many processors there are for the threads of a process.
#pragma once

#include <string>

namespace rnnfast {

// Those that it may run on and, rounded up, no more than its control groups' quota: a container on a large machine has few, though
// torch sees them all. RNNFAST_CPU_PROCESSORS overrides it. Found out once.
int processors();

// The least quota of control groups, as /proc/self/cgroup lists them, and of those around them, or 0 where none has one.
double processor_quota(const std::string& groups, const std::string& root);

}  // namespace rnnfast
