// A lane's neighbors in a row of kept values (neighbors_from): eight, or four where inner columns end with 16.
#pragma once
#include "kernels/cuda/hopper_rows.h"

namespace petl::cuda {

// Zeros where `valid` is false, and beyond `count`.
__device__ __forceinline__ void load_neighbors(bool valid, const float* source, int count, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const bool is_there = valid && i < count;
    const float4 four = is_there ? *reinterpret_cast<const float4*>(source + i) : make_float4(0, 0, 0, 0);
    values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
  }
}

template <class T>
__device__ __forceinline__ void load_neighbors(bool valid, const T* source, int count, float (&values)[8]) {
  Packed<T> packed = {};
  if (count == 8) {
    packed = load_if(valid, source);
  } else if (valid) {
    const uint2 four = *reinterpret_cast<const uint2*>(source);
    packed.words[0] = make_uint4(four.x, four.y, 0, 0);
  }
  unpack(packed, values);
}

template <class T>
__device__ __forceinline__ void store_neighbors(bool valid, T* target, int count, const uint32_t (&pairs)[4]) {
  if (!valid) return;
  if (count == 8) {
    *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  } else {
    *reinterpret_cast<uint2*>(target) = make_uint2(pairs[0], pairs[1]);
  }
}

// The lane's sums of a line in the blocks of 8 columns that its neighbors are in.
template <int kSums>
__device__ __forceinline__ void get_neighbors(const float (&sums)[kSums], int block, int line, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool exists = i < neighbors_from<2 * kSums>(block);
    values[i] = exists ? sums[(block + i / 2) * 4 + line * 2 + i % 2] : 0;
  }
}

// The left operand of the next product is what the sums become, pair by pair.
template <int kSteps>
__device__ __forceinline__ void set_neighbors(uint32_t (&hidden)[kSteps][4], int block, int line,
                                              const uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (2 * i < neighbors_from<16 * kSteps>(block)) hidden[(block + i) / 2][(block + i) % 2 * 2 + line] = pairs[i];
  }
}

template <class T>
__device__ __forceinline__ void pack_pairs(const float (&values)[8], uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack_pair(values[2 * i], values[2 * i + 1], T{});
}

// A lane's share of a sum over all rows becomes the warp's, in the warp's own element.
__device__ __forceinline__ void store_share(double share, double* shares, const WarpRows& rows) {
  share = sum_warp(share);
  if (threadIdx.x % 32 == 0 && rows.first < rows.R) shares[rows.first / kWarpRows] = share;
}

// So many elements have one.
constexpr int64_t hopper_shares(int64_t R) { return (R + kWarpRows - 1) / kWarpRows; }

}  // namespace petl::cuda
