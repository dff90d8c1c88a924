// Says what the CUDA kernels of an op take, in a build without them too.
#pragma once
#include <cstdint>
#include <tuple>

#include "kernels/cuda/kernels.h"

namespace petl {

// (what the width is a multiple of, the greatest width, the greatest inner size).
template <const cuda::Limits& limits>
std::tuple<int64_t, int64_t, int64_t> cuda_limits() {
  return {cuda::kVectorWidth, cuda::kMaxWidth, limits.max_inner};
}

}  // namespace petl
