// What the tests of the CUDA kernels on the emulator share.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/cuda/kernels.h"

namespace emulated {

constexpr petl::cuda::Queue kQueue{0, nullptr};

inline void expect_success(int error) {
  if (!error) return;
  std::printf("launch failed: %s\n", petl::cuda::error_text(error));
  std::exit(EXIT_FAILURE);
}

// A workspace of exactly the size asked for; of doubles, since device memory is aligned.
inline std::vector<double> workspace(int64_t bytes) { return std::vector<double>(bytes / sizeof(double)); }

}  // namespace emulated
