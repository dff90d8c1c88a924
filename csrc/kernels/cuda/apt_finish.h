// The last launch of prompt diffusion's backward: from the slabs' sums to the gradients.
#pragma once
#include "kernels/cuda/launch.h"

namespace petl::cuda {

struct AptFinish {
  const float* sums[2];  // [slabs, P, D]
  float* targets[2];     // [P, D]; null: not wanted
  int slabs;
  int64_t count;         // P D
  const double* shares;  // of dlog_scale, [blocks]
  int64_t blocks;
  float* dlog_scale;  // null: not wanted
};

int finish_apt(Queue queue, const AptFinish& task);

}  // namespace petl::cuda
