#include <atomic>
#include <cstdlib>

#include "kernels/cuda/hopper.h"

namespace petl::cuda {
namespace {

HopperChoice choice_of(const std::string& value) {
  if (value == "1") return HopperChoice::on;
  return value.empty() || value == "0" ? HopperChoice::off : HopperChoice::unknown;
}

std::atomic<HopperChoice>& choice() {
  const char* const value = std::getenv("PETL_HOPPER");
  static std::atomic<HopperChoice> choice{choice_of(value ? value : "")};
  return choice;
}

}  // namespace

HopperChoice hopper_choice() { return choice(); }

void choose_hopper(const std::string& value) { choice() = choice_of(value); }

const char* hopper_error_text(int error) {
  switch (error) {
    case kUnknownHopperChoice:
      return "the environment variable PETL_HOPPER must be 0 or 1";
    case kHopperIsNotBuilt:
      return "PETL_HOPPER=1 must meet a build that holds code for sm_90a, got one without it";
    case kNotHopper:
      return "PETL_HOPPER=1 must meet a GPU of compute capability 9.0, got another one";
    case kNoTileMaps:
      return "PETL_HOPPER=1 must meet a driver that makes tensor maps (CUDA 12.0 or later), got one that does not";
    case kNoRoomForCluster:
      return "PETL_HOPPER=1 must meet a GPU that can hold the path's clusters, got one that cannot";
    default:
      return nullptr;
  }
}

}  // namespace petl::cuda
