// Which instruction set to run, of those that the library was compiled for: each defines RNNFAST_ and its name.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnnfast {

namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

namespace {

struct Choice {
  const char* name;
  bool available;
  const Kernels& kernels;
  const Kernels& bf16;
};

#if defined(RNNFAST_AMX)
// The system hands out the matrix unit's registers to processes that ask for them.
bool may_use_amx() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

#if defined(RNNFAST_AVX2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#if defined(RNNFAST_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* wanted = std::getenv("RNNFAST_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  const Choice choices[] = {
#if defined(RNNFAST_AMX)
      {"amx", has_avx512() && __builtin_cpu_supports("avx512bf16") && may_use_amx(), avx512::kernels, amx::kernels},
#endif
#if defined(RNNFAST_AVX512_BF16)
      // Intel's bfloat16 product of vectors runs at half the rate of its float32 product: it is taken only if asked for.
      {"avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16") && (wanted || !__builtin_cpu_is("intel")),
       avx512::kernels, avx512_bf16::kernels},
#endif
#if defined(RNNFAST_AVX512)
      {"avx512", has_avx512(), avx512::kernels, avx512::kernels},
#endif
#if defined(RNNFAST_AVX2)
      {"avx2", has_avx2(), avx2::kernels, avx2::kernels},
#endif
#if defined(RNNFAST_GENERIC)
      {"generic", true, generic::kernels, generic::kernels},
#endif
  };
  for (const Choice& choice : choices) {
    if (wanted && std::strcmp(wanted, choice.name) != 0) continue;
    if (choice.available) return choice;
    if (wanted) throw std::runtime_error(std::string("RNNFAST_CPU_ISA=") + wanted + ": this processor does not have it");
  }
  std::string names;
  for (const Choice& choice : choices) names += (names.empty() ? "" : ", ") + std::string(choice.name);
  if (!wanted) throw std::runtime_error("this library was compiled for other processors, with " + names);
  throw std::runtime_error(std::string("RNNFAST_CPU_ISA=") + wanted + ": not an instruction set of this build; choose " + names);
}

}  // namespace

const Kernels& choose_kernels(DType dtype) {
  static const Choice chosen = choose();
  return dtype == DType::bfloat16 ? chosen.bf16 : chosen.kernels;
}

const MatrixUnit* matrix_unit() { return choose_kernels(DType::bfloat16).matrix_unit; }

}  // namespace rnnfast
