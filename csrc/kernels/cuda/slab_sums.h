// The sums of slabs of rows (weight_gradient.h), added in order.
#pragma once
#include "kernels/cuda/launch.h"

namespace petl::cuda {

// Of the loads of one thread so many are under way together: two rounds for the 22 slabs that a width of 768 has.
constexpr int kSlabsTogether = 12;

__device__ __forceinline__ void add_to(float& total, float part) { total += part; }
__device__ __forceinline__ void add_to(float4& total, const float4& part) {
  total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
}

// The sum of what lies at `first`, and `stride` elements further in every following slab. Zero without slabs.
template <class Vector>
__device__ __forceinline__ Vector add_slabs(const float* first, int slabs, int64_t stride) {
  Vector total = {};
#pragma unroll 1
  for (int begin = 0; begin < slabs; begin += kSlabsTogether) {
    Vector parts[kSlabsTogether];
#pragma unroll
    for (int i = 0; i < kSlabsTogether; ++i) {
      const bool exists = begin + i < slabs;
      parts[i] = exists ? *reinterpret_cast<const Vector*>(first + (begin + i) * stride) : Vector{};
    }
#pragma unroll
    for (int i = 0; i < kSlabsTogether; ++i) add_to(total, parts[i]);
  }
  return total;
}

}  // namespace petl::cuda
