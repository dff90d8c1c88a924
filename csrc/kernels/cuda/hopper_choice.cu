#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels/cuda/hopper.h"

namespace petl::cuda {
namespace {

HopperChoice choice_of_environment() {
  const char* const value = std::getenv("PETL_HOPPER");
  const std::string text = value ? value : "";
  if (text == "1") return HopperChoice::on;
  return text.empty() || text == "0" ? HopperChoice::off : HopperChoice::unknown;
}

std::atomic<HopperChoice>& choice() {
  static std::atomic<HopperChoice> choice{choice_of_environment()};
  return choice;
}

}  // namespace

HopperChoice hopper_choice() { return choice(); }

void choose_hopper(HopperChoice wanted) { choice() = wanted; }

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
