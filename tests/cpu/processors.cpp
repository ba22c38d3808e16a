// Prints the quota of the control groups that the first file lists, in the folder given next; given a folder alone, the cache listed
// in it; without arguments, the processors.
#include "../../csrc/cpu/processors.h"

#include <cstdio>

int main(int count, char** arguments) {
  if (count == 3)
    std::printf("%g\n", rnnfast::processor_quota(arguments[1], arguments[2]));
  else if (count == 2)
    std::printf("%lld\n", static_cast<long long>(rnnfast::listed_cache(arguments[1])));
  else
    std::printf("%d\n", rnnfast::processors());
}
