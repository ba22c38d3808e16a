#include "processors.h"

#include <omp.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace rnnfast {
namespace {

// What a group may use of each period, both in microseconds, in processors. Without a quota the files say "max", or -1.
double quota_of_group(const std::string& folder) {
  double quota = 0, period = 0;
  if (std::ifstream second(folder + "/cpu.max"); second) {
    second >> quota >> period;
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// By RNNFAST_CPU_PROCESSORS, or 0.
int processors_told() {
  const char* const told = std::getenv("RNNFAST_CPU_PROCESSORS");
  if (!told || !*told) return 0;
  char* end = nullptr;
  const long n = std::strtol(told, &end, 10);
  if (*end || n < 1 || n > INT_MAX)
    throw std::runtime_error(std::string("RNNFAST_CPU_PROCESSORS=") + told + ": give a number of processors, 1 or more");
  return int(n);
}

// When the library was loaded: what OpenMP, too, goes by.
const int counted = omp_get_num_procs();

// Those that the calling thread, and the threads that it starts, are bound to.
int bound_to() {
  static thread_local const int number = std::max(1, omp_get_num_procs());
  return number;
}

}  // namespace

double processor_quota(const char* groups, const char* root) {
  double least = 0;
  std::ifstream lines(groups);
  for (std::string line; std::getline(lines, line);) {  // number:controllers:path, without controllers in version 2
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = ',' + line.substr(first + 1, second - first - 1) + ',';
    const bool second_version = controllers == ",,";
    if (!second_version && controllers.find(",cpu,") == std::string::npos) continue;
    // In a container its own group may be the root of what it sees, whatever the path says.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      if (path == "/") path.clear();
      const double quota = quota_of_group(std::string(root) + (second_version ? "" : "/cpu") + path);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

int processors() {
  static const int told = processors_told();
  static const double quota = processor_quota("/proc/self/cgroup", "/sys/fs/cgroup");
  if (told) return told;
  return quota > 0 ? std::max(1, int(std::min<double>(bound_to(), quota + 0.999))) : bound_to();
}

bool is_confined() { return processors() < counted; }

int64_t listed_cache(const char* folder) {
  const auto file = [&](const char* name) { return std::ifstream(std::string(folder) + name); };
  int64_t size = 0;
  char unit = 0;
  file("/size") >> size >> unit;
  if (unit == 'K') size <<= 10;
  if (unit == 'M') size <<= 20;
  int64_t cores = 0;  // that share it, listed as in 0-3,8
  std::ifstream shared = file("/shared_cpu_list");
  for (int64_t first = 0; shared >> first; shared.ignore(1, ',')) {
    int64_t last = first;
    if (shared.peek() == '-') shared.ignore(1) >> last;
    cores += last - first + 1;
  }
  return size / std::max<int64_t>(1, cores);
}

int64_t near_bytes() {
  static const int64_t near = [] {
    int64_t second_level = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    second_level = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    // The C library of ARM does not know.
    if (second_level <= 0) second_level = listed_cache("/sys/devices/system/cpu/cpu0/cache/index2");
    constexpr int64_t USUAL = int64_t(1) << 20;
    return (second_level > 0 ? second_level : USUAL) / 4 * 3;
  }();
  return near;
}

namespace {

// AMD's Zen 3 and 5 see weights coming from the third-level cache: fetching them only takes time then, and more of it where few
// tiles share it. Of more bytes than these some come from memory.
struct SeenComing {
  int64_t bytes, tiles_within, tiles_beyond;  // for no more tiles than these, up to so many bytes and beyond, nothing is fetched
};
const SeenComing seen_coming = []() -> SeenComing {
#if defined(__x86_64__)
  constexpr unsigned ZEN_3 = 25, ZEN_5 = 26;
  unsigned version = 0, unused = 0;
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd") && __get_cpuid(1, &version, &unused, &unused, &unused)) {
    const unsigned family = (version >> 8 & 15) + (version >> 20 & 255);  // and what extends it
    if (family >= ZEN_5) return {12 << 20, INT64_MAX, 3};
    if (family == ZEN_3 && !__builtin_cpu_supports("avx512f")) return {8 << 20, 4, 1};  // with it, Zen 4
  }
#endif
  return {0, 1, 1};
}();

}  // namespace

int64_t tiles_not_fetching(int64_t bytes) { return bytes > seen_coming.bytes ? seen_coming.tiles_beyond : seen_coming.tiles_within; }

}  // namespace rnnfast
