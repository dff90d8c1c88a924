#include "kernels/cpu/kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__) && !defined(PETL_PORTABLE_ONLY)
#define PETL_X86_PATHS
#endif
#include "kernels/cpu/compiled_paths.h"
#ifdef PETL_ARM_PATHS
#include <sys/auxv.h>
#endif
#ifdef PETL_MATRIX_REGISTERS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace petl::cpu {

namespace portable {
extern const Kernels kernels;
}
#ifdef PETL_X86_PATHS
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#ifdef PETL_ARM_PATHS
namespace neon_bf16 {
extern const Kernels kernels;
}
#endif
#ifdef PETL_MATRIX_REGISTERS
namespace amx {
extern const Kernels kernels;
}
#endif

namespace {

#ifdef PETL_MATRIX_REGISTERS
// Linux lends the matrix registers to a process that asks for them.
bool may_use_matrix_registers() {
#ifdef PETL_EMULATE_MATRIX_REGISTERS
  return true;
#else
  constexpr uint32_t kBfloat16 = 1u << 22, kRegisters = 1u << 24;
  constexpr long kRequest = 0x1023, kRegisterData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  uint32_t a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBfloat16) || !(d & kRegisters)) return false;
  return syscall(SYS_arch_prctl, kRequest, kRegisterData) == 0;
#endif
}
#endif

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
#ifdef PETL_X86_PATHS
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bfloat16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef PETL_MATRIX_REGISTERS
  if (has_bfloat16 && may_use_matrix_registers()) found.push_back(&amx::kernels);
#endif
  if (has_bfloat16) found.push_back(&avx512_bf16::kernels);
  if (has_avx512) found.push_back(&avx512::kernels);
  if (has_avx2) found.push_back(&avx2::kernels);
#endif
#ifdef PETL_ARM_PATHS
  constexpr unsigned long kBfloat16 = 1ul << 14;  // HWCAP2_BF16
  if (getauxval(AT_HWCAP2) & kBfloat16) found.push_back(&neon_bf16::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> paths = detect();
  return paths;
}

const Kernels* find(const char* name) {
  if (!std::strcmp(name, "auto")) return available().front();
  for (const Kernels* kernels : available()) {
    if (!std::strcmp(kernels->path, name)) return kernels;
  }
  return nullptr;
}

const Kernels* default_path() {
  const char* name = std::getenv("PETL_CPU_PATH");
  return find(name ? name : "auto");
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{default_path()};
  return kernels;
}

}  // namespace

const Kernels* kernels() { return chosen(); }

bool choose_path(const char* name) {
  const bool is_auto = !std::strcmp(name, "auto");
  const Kernels* wanted = is_auto ? default_path() : find(name);
  if (wanted || is_auto) chosen() = wanted;
  return wanted || is_auto;
}

const char* available_paths() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : available()) joined += (joined.empty() ? "" : " ") + std::string(kernels->path);
    return joined;
  }();
  return names.c_str();
}

}  // namespace petl::cpu
