// What the tests of the emulator's counters share.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "emulator/counts.h"
#include "emulator_checks.h"

namespace counts_test {

namespace counts = emulator::counts;
using emulator_test::expect;
using emulator_test::launch;
using petl::cuda::shared_memory;
using Counts = std::map<std::string, uint64_t>;

// The counts of a block whose names begin so.
inline Counts named(const counts::BlockCounts& block, const std::string& prefix) {
  Counts found;
  for (const auto& [name, number] : block.counts) {
    if (name.compare(0, prefix.size(), prefix) == 0) found[name] = number;
  }
  return found;
}

// Of one block of `threads`, which may have as much shared memory as it likes.
template <class... Parameters, class... Arguments>
counts::BlockCounts count(unsigned threads, void (*kernel)(Parameters...), Arguments... arguments) {
  counts::take_launches();
  launch(1, threads, size_t{32} << 10, kernel, arguments...);
  return counts::take_launches().at(0).blocks.at(0);
}

inline void expect_counts(const std::string& what, const Counts& found, const Counts& wanted) {
  std::string text = what + ":";
  for (const auto& [name, number] : found) text += " " + name + " = " + std::to_string(number) + ";";
  expect(found == wanted, text);
}

inline Counts shared(const std::string& kind, uint64_t requests, uint64_t wavefronts, uint64_t least) {
  const std::string name = "shared " + kind;
  return {{name + " requests", requests}, {name + " wavefronts", wavefronts}, {name + " least", least}};
}

inline Counts tensor(const std::string& name, uint64_t requests, uint64_t bytes, uint64_t sectors) {
  return {{name + " requests", requests}, {name + " bytes", bytes}, {name + " sectors", sectors}};
}

inline Counts read(const std::string& name, uint64_t requests, uint64_t bytes, uint64_t sectors,
                   uint64_t from_second_level) {
  Counts all = tensor(name + " read", requests, bytes, sectors);
  all[name + " read L2"] = from_second_level;
  return all;
}

class Tensors {
 public:
  Tensors() {
    counts::name_memory("in", in, sizeof in);
    counts::name_memory("out", out, sizeof out);
  }
  ~Tensors() { counts::forget_memory(); }

  alignas(256) float in[1024] = {};
  alignas(256) float out[1024] = {};
};

}  // namespace counts_test
