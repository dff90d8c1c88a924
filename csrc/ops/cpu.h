// How an op reaches the CPU kernels: the chosen path, and torch's thread pool.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

#include "kernels/cpu/kernels.h"
#include "kernels/cuda/kernels.h"
#include "ops/check.h"

namespace petl {

inline const cpu::Kernels& cpu_kernels() {
  const cpu::Kernels* kernels = cpu::kernels();
  PETL_REQUIRE(kernels,
               "petl_ext: the environment variable PETL_CPU_PATH must be auto or one of: ", cpu::available_paths(),
               ", got ", std::getenv("PETL_CPU_PATH"));
  return *kernels;
}

inline void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

// The device of a call, as the ops' templates want it; see Cuda in ops/cuda.h.
class Cpu {
 public:
  static constexpr int64_t kRowAlignment = 1;
  static constexpr bool kMixesDtypes = true;  // x, y, residual and dout each in a dtype of its own

  explicit Cpu(const Tensor&) {}

  void holds(const Argument& argument) const {
    PETL_REQUIRE(argument.tensor.is_cpu(), argument.op, ": ", argument.name,
                 " must be on the CPU, as the other arguments are");
  }

  void supports(const char*, const cuda::Limits&, int64_t, int64_t) const {}
};

}  // namespace petl
