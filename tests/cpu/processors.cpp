// Prints the quota of the control groups that the first file lists, in the folder given next; without arguments, the processors.
#include "../../csrc/cpu/processors.h"

#include <cstdio>

int main(int count, char** arguments) {
  if (count == 3)
    std::printf("%g\n", rnnfast::processor_quota(arguments[1], arguments[2]));
  else
    std::printf("%d\n", rnnfast::processors());
}
