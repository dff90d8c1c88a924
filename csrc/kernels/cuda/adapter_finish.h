// The last launch of the adapter's backward: from the slabs' sums to the gradients of the parameters.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/launch.h"

namespace petl::cuda {

struct AdapterSums {
  const float* down;     // [slabs, B, D], dhidden^T x; x is normalized, if there is a norm
  const float* up;       // [slabs, B, D], hidden^T dout
  const float* dhidden;  // [slabs, B]
  const float* dout;     // [slabs, D]
  int slabs;
  const double* shares;  // of dgain, [blocks]
  int64_t blocks;
};

int finish_adapter(Queue queue, const AdapterBackward& args, const AdapterSums& sums);

}  // namespace petl::cuda
