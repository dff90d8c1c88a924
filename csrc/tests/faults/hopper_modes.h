// What the programs share into which faults are planted: their sizes, and the modes of the emulator.
#pragma once
#include <cstdio>
#include <stdexcept>

#include "emulated.h"
#include "emulator/settings.h"
#include "kernels/cuda/elements.h"
#include "stored.h"

namespace hopper_faults {

using namespace petl;
using cuda::Bfloat16;
using stored::close;
using stored::Doubles;
using stored::Floats;
using stored::rounded;
using stored::Stored;

// Three tiles of rows for two blocks, the last one ragged; as many chunks as go round the ring twice; inner columns
// whose last piece is the narrowest.
constexpr int kR = 300, kD = 384, kUnits = 200, kInner = 208, kBlocks = 2;

// What lies behind a result, and must stay as it is.
constexpr float kMargin = -7;

inline bool has_margin(const Floats& values, size_t count) {
  bool good = values.size() > count;
  for (size_t i = count; i < values.size(); ++i) good &= values[i] == kMargin;
  return good;
}

// Prints the modes of the emulator in which something is wrong, or fails.
template <class IsRight>
void print_wrong_modes(const IsRight& is_right) {
  using namespace emulator;
  for (const Order order : {Order::forward, Order::reverse}) {
    for (const Copies copies : {Copies::lazy, Copies::eager}) {
      Settings settings;
      settings.order = order;
      settings.copies = copies;
      settings.threads = 1;
      configure(settings);
      bool good = false;
      try {
        good = is_right();
      } catch (const std::runtime_error& error) {
        std::printf("%s\n", error.what());
      }
      if (!good) std::printf("wrong in %s, %s\n", name_of(order), name_of(copies));
    }
  }
}

}  // namespace hopper_faults
