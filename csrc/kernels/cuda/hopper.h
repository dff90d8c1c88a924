// The path of Hopper (compute capability 9.0, code for sm_90a) through `apt` and `adapter`, as the host sees it:
// whether it is on, and what it takes. No GPU has confirmed it yet, so that it is off unless the environment variable
// PETL_HOPPER is 1.
#pragma once
#include <string>

#include "kernels/cuda/kernels.h"
#include "kernels/tensor.h"

namespace petl::cuda {

enum class HopperChoice { off, on, unknown };

// What the environment says, when it is first asked for; a test may say otherwise, in the variable's words.
HopperChoice hopper_choice();
void choose_hopper(const std::string& value);

// Whether this build holds the path's kernels.
bool hopper_is_built();

constexpr int64_t kHopperWidthMultiple = 64;  // of D
constexpr int64_t kHopperMaxInner = 256;      // P or B
constexpr int64_t kHopperLeastRows = 1537;    // fewer are the business of few_rows.h
constexpr int64_t kHopperMostRows = int64_t{1} << 30;

// The one table of what the path takes: elements of 16 bits, and these sizes. All else is the lean path's.
constexpr bool hopper_takes(DType dtype, int64_t D, int64_t inner) {
  return dtype != DType::float32 && D % kHopperWidthMultiple == 0 && inner <= kHopperMaxInner;
}

// Whether a call's weights are packed for the path, and whether the call runs on it: a copy of tiles needs rows that do
// not overlap. `added`: other rows that are copied so, with null data if there are none.
inline bool hopper_packs(DType dtype, int64_t D, int64_t inner) {
  return hopper_choice() == HopperChoice::on && hopper_takes(dtype, D, inner);
}
inline bool hopper_runs(int64_t R, int64_t D, int64_t inner, const ConstRows& x, const ConstRows& added) {
  const bool are_apart = x.stride >= D && (!added.data || added.stride >= D);
  return hopper_packs(x.dtype, D, inner) && R >= kHopperLeastRows && R <= kHopperMostRows && are_apart;
}

// Why the path cannot run where PETL_HOPPER=1 asks for it, beside CUDA's own errors.
enum HopperError {
  kUnknownHopperChoice = -2,
  kHopperIsNotBuilt = -3,
  kNotHopper = -4,
  kNoTileMaps = -5,
  kNoRoomForCluster = -6,
};
const char* hopper_error_text(int error);  // null: another error

// 0, or why a GPU cannot run the path.
constexpr int hopper_error_of(int major, int minor, bool makes_tile_maps) {
  if (major != 9 || minor != 0) return kNotHopper;
  return makes_tile_maps ? 0 : kNoTileMaps;
}

}  // namespace petl::cuda
