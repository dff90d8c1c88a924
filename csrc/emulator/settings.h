// How kernels are run; what a sound kernel computes depends on none of it.
#pragma once
#include <cstddef>
#include <string>

namespace emulator {

enum class Order { forward, reverse };  // of blocks, of warps and of the lanes in a warp
enum class Copies { lazy, eager };      // asynchronous copies land when they must have landed, or at once

struct Settings {
  Order order = Order::forward;
  Copies copies = Copies::lazy;
  unsigned threads = 0;                            // of the operating system; 0: one per core
  size_t shared_memory_limit = size_t{227} << 10;  // bytes that a block may ask for
  // Only the first block of a launch and its neighbors, the middle one and the last run: enough for counts.
  bool samples_blocks = false;
};

// At first as the environment variables PETL_EMULATOR_ORDER and PETL_EMULATOR_COPIES say.
Settings settings();
void configure(const Settings& settings);

const char* name_of(Order order);
const char* name_of(Copies copies);
// These throw std::invalid_argument.
Order order_named(const std::string& name);
Copies copies_named(const std::string& name);

}  // namespace emulator
