// What error messages say.
#pragma once
#include <string>

#include "emulator/block.h"

namespace emulator {

inline std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

inline std::string text(const Place& place) {
  return std::string(place.function) + " (" + place.file + ":" + std::to_string(place.line) + ")";
}

}  // namespace emulator
