// What a product's sums are: one step of it, and where a warp's threads hold them.
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

// A thread's part of the sums of one warp: kBlocks blocks of 16 rows, kGroups groups of four 8-column blocks. Its rows
// are numbered 0 ... 2 kBlocks - 1: rows g and g + 8 of the first block, then of the second.
template <int kBlocks, int kGroups>
struct Sums {
  float parts[kBlocks][kGroups][4][4];

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
#pragma unroll
    for (int i = 0; i < kBlocks * kGroups * 16; ++i)
      visit(parts[i / 16 / kGroups][i / 16 % kGroups][i / 4 % 4][i % 4], i);
  }

  __device__ __forceinline__ void clear() {
    for_each([](float& sum, int) { sum = 0; });
  }

  __device__ __forceinline__ void add(const Sums& other) {
    for_each([&](float& sum, int i) { sum += other.parts[i / 16 / kGroups][i / 16 % kGroups][i / 4 % 4][i % 4]; });
  }

  // Eight neighboring columns of one row, of tiles whose columns lie as slot_of says.
  __device__ __forceinline__ void get(int group, int row, float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = parts[row / 2][group][i / 2][2 * (row % 2) + i % 2];
  }

  __device__ __forceinline__ void set(int group, int row, const float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) parts[row / 2][group][i / 2][2 * (row % 2) + i % 2] = values[i];
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

// Sums over a long depth: of floats, sums of sums, of which the short ones end at every multiple of kShortSum.
template <class T, int kBlocks, int kGroups>
struct LongSums;

template <int kBlocks, int kGroups>
struct LongSums<float, kBlocks, kGroups> {
  Sums<kBlocks, kGroups> sums, total;

  __device__ __forceinline__ void clear() {
    sums.clear();
    total.clear();
  }
  // Before a chunk that is not added to what is there.
  __device__ __forceinline__ void begin() { total.clear(); }
  __device__ __forceinline__ void end_of(int depth) {
    if (depth % kShortSum == 0) finish();
  }
  __device__ __forceinline__ Sums<kBlocks, kGroups>& finish() {
    total.add(sums);
    sums.clear();
    return total;
  }
};

template <class T, int kBlocks, int kGroups>
struct LongSums {
  Sums<kBlocks, kGroups> sums;

  __device__ __forceinline__ void clear() { sums.clear(); }
  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void end_of(int) {}
  __device__ __forceinline__ Sums<kBlocks, kGroups>& finish() { return sums; }
};

}  // namespace petl::cuda
