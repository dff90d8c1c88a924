#include "kernels/cpu/kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__) && !defined(PETL_PORTABLE_ONLY)
#define PETL_X86_PATHS
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

namespace {

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
#ifdef PETL_X86_PATHS
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kernels);
  if (has_avx512) found.push_back(&avx512::kernels);
  if (has_avx2) found.push_back(&avx2::kernels);
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
