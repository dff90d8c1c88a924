// Products of tiles in shared memory that are a fixed depth deep, one warp's share:
// sums [16 kBlocks, 32 kGroups] += left [16 kBlocks, depth] right [32 kGroups, depth]^T
//
// Addresses differ between the chunks of a long product by the place of the tile alone, so a thread finds its offsets
// once.
#pragma once
#include "kernels/cuda/product.h"
#include "kernels/cuda/tile.h"

namespace petl::cuda {

// Where the thread's parts of the operands lie: of left in tiles LeftTile [16 kBlocks, ...], of right in tiles
// RightTile [slots, ...], of which the warp's groups of 32 are kGroupStep slots apart.
template <class T, class LeftTile, class RightTile, int kGroupStep>
class ChunkProduct {
 public:
  // Depth of a step, and steps of a chunk that is as deep as the right tile.
  static constexpr int kStep = 16, kSteps = RightTile::kColumns / kStep;

  // The warp's first rows of the first tiles of left and right.
  __device__ __forceinline__ ChunkProduct(const T* left, int left_row, const T* right, int right_row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      left_[step] = shared_address(left + LeftTile::offset(left_row + lane % 16, 2 * step + lane / 16));
      right_[step] =
          shared_address(right + RightTile::offset(right_row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      keep(left_[step]);
      keep(right_[step]);
    }
  }

  // Adds to sums, or if `fresh` to nothing, the first `steps` steps of the depth, and of the warp's groups `groups`,
  // which is kGroups or one less. The tiles lie so many elements behind the first ones; `rest`, where kRest, is where
  // that of what rounding left out of right lies, behind right's.
  template <bool kRest, int kBlocks, int kGroups>
  __device__ __forceinline__ void add(Sums<kBlocks, kGroups>& sums, int left, int right, int rest, int groups,
                                      int steps, bool fresh) const {
    if (groups == kGroups) {
      add_groups<kRest, kGroups>(sums, left, right, rest, steps, fresh);
    } else if constexpr (kGroups > 1) {
      add_groups<kRest, kGroups - 1>(sums, left, right, rest, steps, fresh);
    }
  }

 private:
  static constexpr int kBytes = sizeof(T);

  // Whole chunks are one block of code, in which the compiler can load ahead.
  template <bool kRest, int kCount, class SumsOfThread>
  __device__ __forceinline__ void add_groups(SumsOfThread& sums, int left, int right, int rest, int steps,
                                             bool fresh) const {
    if (steps < kSteps) {
      if (fresh) sums.clear();
#pragma unroll
      for (int step = 0; step < kSteps - 1; ++step) {
        if (step < steps) add_step<kRest, kCount>(sums, step, left, right, rest);
      }
    } else if (fresh) {
      sums.clear();
      add_all<kRest, kCount>(sums, left, right, rest);
    } else {
      add_all<kRest, kCount>(sums, left, right, rest);
    }
  }

  template <bool kRest, int kCount, class SumsOfThread>
  __device__ __forceinline__ void add_all(SumsOfThread& sums, int left, int right, int rest) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) add_step<kRest, kCount>(sums, step, left, right, rest);
  }

  template <bool kRest, int kCount, int kBlocks, int kGroups>
  __device__ __forceinline__ void add_step(Sums<kBlocks, kGroups>& sums, int step, int left, int right,
                                           int rest) const {
    uint32_t parts[kBlocks][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      load_matrices(parts[block], left_[step] + kBytes * left + kBytes * 16 * block * LeftTile::kColumns);
    }
#pragma unroll
    for (int group = 0; group < kCount; ++group) {
      const SharedAddress tile = right_[step] + kBytes * right + kBytes * group * kGroupStep * RightTile::kColumns;
      add_group(sums, group, parts, tile);
      if constexpr (kRest) add_group(sums, group, parts, tile + kBytes * rest);
    }
  }

  template <int kBlocks, int kGroups>
  __device__ __forceinline__ static void add_group(Sums<kBlocks, kGroups>& sums, int group,
                                                   const uint32_t (&left)[kBlocks][4], SharedAddress right) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t parts[4];
      load_matrices(parts, right + kBytes * 16 * pair * RightTile::kColumns);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply_step(sums.parts[block][group][2 * pair], left[block], {parts[0], parts[1]}, T{});
        multiply_step(sums.parts[block][group][2 * pair + 1], left[block], {parts[2], parts[3]}, T{});
      }
    }
  }

  SharedAddress left_[kSteps], right_[kSteps];
};

template <class LeftTile, class RightTile, int kGroupStep>
class ChunkProduct<float, LeftTile, RightTile, kGroupStep> {
 public:
  static constexpr int kStep = 4, kSteps = RightTile::kColumns / kStep;

  __device__ __forceinline__ ChunkProduct(const float* left, int left_row, const float* right, int right_row)
      : left_(left),
        right_(right),
        left_row_(left_row + static_cast<int>(threadIdx.x) % 32 / 4),
        right_row_(right_row + static_cast<int>(threadIdx.x) % 4 * 2) {}

  template <bool kRest, int kBlocks, int kGroups>
  __device__ __forceinline__ void add(Sums<kBlocks, kGroups>& sums, int left, int right, int, int groups, int steps,
                                      bool fresh) const {
    if (fresh) sums.clear();
    static_assert(kBlocks == 1, "two blocks of rows with sums of sums would not fit the registers");
    static_assert(!kRest, "floats are not rounded");
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step >= steps) break;
      // Vectors are exchanged alike in rows whose numbers differ by eight.
      const float* const row = left_ + left + LeftTile::offset(left_row_, step);
      const float4 parts[2] = {vector_at(row), vector_at(row + 8 * LeftTile::kColumns)};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (group == kGroups - 1 && groups < kGroups) break;
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          const float* const tile = right_ + right + (group * kGroupStep + 8 * block) * RightTile::kColumns;
          const float4 columns[2] = {vector_at(tile + RightTile::offset(right_row_, step)),
                                     vector_at(tile + RightTile::offset(right_row_ + 1, step))};
          multiply(sums.parts[0][group][block], parts, columns);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static float4 vector_at(const float* source) {
    return *reinterpret_cast<const float4*>(source);
  }

  __device__ __forceinline__ static void multiply(float (&sums)[4], const float4 (&left)[2], const float4 (&right)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums[2 * half] = fmaf(at(left[half], i), at(right[0], i), sums[2 * half]);
        sums[2 * half + 1] = fmaf(at(left[half], i), at(right[1], i), sums[2 * half + 1]);
      }
    }
  }

  const float *left_, *right_;
  int left_row_, right_row_;
};

}  // namespace petl::cuda
