// Says what there is of the Hopper path, in every build.
#include "kernels/cuda/hopper.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#ifndef PETL_EMULATED
namespace petl {
namespace {

// What PETL_HOPPER says, or what is said in its place from now on; nothing is changed by an empty text.
std::string hopper_state([[maybe_unused]] std::string choice) {
#ifdef PETL_WITH_CUDA
  if (!choice.empty()) cuda::choose_hopper(choice);
  if (cuda::hopper_choice() == cuda::HopperChoice::unknown) return "unknown";
  if (cuda::hopper_choice() == cuda::HopperChoice::off) return cuda::hopper_is_built() ? "off" : "not built";
  return cuda::hopper_is_built() ? "on" : "on, but not built";
#else
  return "not built";
#endif
}

// (the ops that have it, what the width is a multiple of, the greatest inner size, the least number of rows).
std::tuple<std::string, int64_t, int64_t, int64_t> hopper_limits() {
  return {"adapter apt", cuda::kHopperWidthMultiple, cuda::kHopperMaxInner, cuda::kHopperLeastRows};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(petl_ext, m) {
  m.def("hopper_state(str choice) -> str");
  m.def("hopper_limits() -> (str, int, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CompositeExplicitAutograd, m) {
  m.impl("hopper_state", TORCH_BOX(&hopper_state));
  m.impl("hopper_limits", TORCH_BOX(&hopper_limits));
}

}  // namespace petl
#endif
