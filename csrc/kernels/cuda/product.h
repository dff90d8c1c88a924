// Products of tiles in shared memory, one warp's share: sums [16, 32 kGroups] += left [16, depth] right [depth,
// columns].
//
// Tensor cores multiply bfloat16 and float16; float32 is multiplied as it is, by every thread for itself. Both leave
// the sums in the same places: lane 4 g + t holds of each 8-column block columns 2 t and 2 t + 1 of rows g (sums 0 and
// 1) and g + 8 (sums 2 and 3).
#pragma once
#include "kernels/cuda/weights.h"

namespace petl::cuda {

// Long sums of floats are sums of sums of this depth, which keeps their rounding errors as small as a good library's.
// Tensor cores' sums are of products of 8 or 11 bits; there it would change nothing.
constexpr int kShortSum = 128;

template <class T>
struct Tile {
  T* data;
  int stride;
};

// Four 8-column blocks, and `sums` of a thread in them.
template <int kGroups>
struct Sums {
  float blocks[kGroups][4][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int block = 0; block < 4; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) blocks[group][block][i] = 0;
      }
    }
  }

  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int block = 0; block < 4; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) blocks[group][block][i] += other.blocks[group][block][i];
      }
    }
  }

  // Eight neighbouring columns of row g (half 0) or g + 8 (half 1), of tiles whose columns lie as slot_of says.
  __device__ __forceinline__ void get(int group, int half, float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = blocks[group][i / 2][2 * half + i % 2];
  }

  __device__ __forceinline__ void set(int group, int half, const float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) blocks[group][i / 2][2 * half + i % 2] = values[i];
  }
};

// The groups of 32 columns that a warp sums: first, first + step, ..., as many as `count`.
struct Groups {
  int first, step, count;
};

__device__ __forceinline__ void multiply_step(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                                              Bfloat16) {
  multiply_bfloat16(sums, left, right);
}

__device__ __forceinline__ void multiply_step(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                                              Float16) {
  multiply_float16(sums, left, right);
}

// Two neighbouring 8-column blocks of 16 rows of depth; `right` points at the first element of the first.
template <class T, Order kOrder>
__device__ __forceinline__ void load_right(uint32_t (&parts)[4], const T* right, int stride) {
  const int lane = threadIdx.x % 32;
  if constexpr (kOrder == Order::columns) {
    load_matrices(parts, right + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
  } else {
    load_matrices_transposed(parts, right + lane % 16 * stride + lane / 16 * 8);
  }
}

template <class T, Order kOrder, int kGroups>
__device__ __forceinline__ void multiply(Sums<kGroups>& sums, Tile<const T> left, Tile<const T> right, Groups groups,
                                         int depth) {
  const int lane = threadIdx.x % 32;
  const int group_elements = 32 * (kOrder == Order::columns ? right.stride : 1);
  const int block_elements = 8 * (kOrder == Order::columns ? right.stride : 1);
  for (int k = 0; k < depth; k += 16) {
    uint32_t left_parts[4];
    load_matrices(left_parts, left.data + lane % 16 * left.stride + k + lane / 16 * 8);
    const T* right_step =
        right.data + groups.first * group_elements + k * (kOrder == Order::columns ? 1 : right.stride);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group >= groups.count) break;
      const T* blocks = right_step + group * groups.step * group_elements;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t parts[4];
        load_right<T, kOrder>(parts, blocks + 2 * pair * block_elements, right.stride);
        multiply_step(sums.blocks[group][2 * pair], left_parts, {parts[0], parts[1]}, T{});
        multiply_step(sums.blocks[group][2 * pair + 1], left_parts, {parts[2], parts[3]}, T{});
      }
    }
  }
}

__device__ __forceinline__ float at(const float4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Of one 8-column block, the thread's two columns at four steps of depth.
template <Order kOrder>
__device__ __forceinline__ void load_right(float (&parts)[4][2], const float* block, int stride) {
  const int t = threadIdx.x % 4;
  if constexpr (kOrder == Order::columns) {
    const float4 columns[2] = {*reinterpret_cast<const float4*>(block + 2 * t * stride),
                               *reinterpret_cast<const float4*>(block + (2 * t + 1) * stride)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      parts[i][0] = at(columns[0], i);
      parts[i][1] = at(columns[1], i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(block + i * stride + 2 * t);
      parts[i][0] = pair.x;
      parts[i][1] = pair.y;
    }
  }
}

__device__ __forceinline__ void multiply_step(float (&sums)[4], const float4 (&left)[2], const float (&right)[4][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums[2 * half] = fmaf(at(left[half], i), right[i][0], sums[2 * half]);
      sums[2 * half + 1] = fmaf(at(left[half], i), right[i][1], sums[2 * half + 1]);
    }
  }
}

template <class T, Order kOrder, int kGroups>
__device__ __forceinline__ void multiply(Sums<kGroups>& sums, Tile<const float> left, Tile<const float> right,
                                         Groups groups, int depth) {
  const int g = threadIdx.x % 32 / 4;
  const int group_elements = 32 * (kOrder == Order::columns ? right.stride : 1);
  const int block_elements = 8 * (kOrder == Order::columns ? right.stride : 1);
  for (int k = 0; k < depth; k += 4) {
    const float4 left_parts[2] = {*reinterpret_cast<const float4*>(left.data + g * left.stride + k),
                                  *reinterpret_cast<const float4*>(left.data + (g + 8) * left.stride + k)};
    const float* right_step =
        right.data + groups.first * group_elements + k * (kOrder == Order::columns ? 1 : right.stride);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group >= groups.count) break;
      const float* blocks = right_step + group * groups.step * group_elements;
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        float parts[4][2];
        load_right<kOrder>(parts, blocks + block * block_elements, right.stride);
        multiply_step(sums.blocks[group][block], left_parts, parts);
      }
    }
  }
}

}  // namespace petl::cuda
