// What there is to run on: how many processors, and what their caches hold. Nothing inline: one copy serves all instruction sets.
#pragma once

#include <cstdint>

namespace rnnfast {

// Those that the calling thread is bound to and, rounded up, no more than its control groups' quota: a container on a large machine
// has few, though torch sees them all. RNNFAST_CPU_PROCESSORS overrides it; where that is no such number, throws std::runtime_error.
int processors();

// Whether those are fewer than OpenMP knows of, so that its idle threads spin though others need the processors.
bool is_confined();

// The least quota of control groups, as /proc/self/cgroup lists them, and of those around them, or 0 where none has one.
double processor_quota(const char* groups, const char* root);

// Bytes of weights that stay in a core's second-level cache from step to step, beside all else that passes through it.
int64_t near_bytes();

// The most tiles of rows sharing weights that do not stay near, of a scan with so many bytes of them, that leave it to the processor
// to fetch these.
int64_t tiles_not_fetching(int64_t bytes);

// Bytes of the second-level cache that a core has, of what is listed in such a folder of sysfs, or 0 where nothing is.
int64_t listed_cache(const char* folder);

}  // namespace rnnfast
