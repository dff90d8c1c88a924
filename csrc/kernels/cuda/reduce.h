// Reductions in a fixed order: over the lanes that share a row of sums, over a warp, over a block.
#pragma once
#include "kernels/cuda/ptx.h"

namespace petl::cuda {

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// A NaN wins, from either side.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return max_or_nan(a, b); }
};

// Lanes 4 g ... 4 g + 3 hold parts of one row.
template <class Combine>
__device__ __forceinline__ float reduce_quad(float value, Combine combine) {
  value = combine(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return combine(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

__device__ __forceinline__ double sum_warp(double value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// The greatest of every thread's value, in all threads. `scratch` has room for one value per warp.
__device__ __forceinline__ float max_block(float value, float* scratch) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = max_or_nan(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = max_or_nan(value, scratch[warp]);
  return value;
}

// The sum of every thread's value, in thread 0. `scratch` has room for one value per warp.
__device__ __forceinline__ double sum_block(double value, double* scratch) {
  value = sum_warp(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += scratch[warp];
  }
  return total;
}

}  // namespace petl::cuda
