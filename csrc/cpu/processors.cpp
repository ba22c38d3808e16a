#include "processors.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "threads.h"

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

}  // namespace

double processor_quota(const std::string& groups, const std::string& root) {
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
      const double quota = quota_of_group(root + (second_version ? "" : "/cpu") + path);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

int processors() {
  static const int number = [] {
    const char* const told = std::getenv("RNNFAST_CPU_PROCESSORS");
    if (const int n = told ? std::atoi(told) : 0; n > 0) return n;
    const double quota = processor_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    return std::max(1, quota > 0 ? std::min(omp_get_num_procs(), int(quota + 0.999)) : omp_get_num_procs());
  }();
  return number;
}

}  // namespace rnnfast
