// LayerNorm's statistics of rows that are on their way to a product, and are read for that alone.
#pragma once
#include "kernels/cuda/layer_norm.h"

namespace petl::cuda {

// Of a row or a part of it, from the row's first element: no more than all the others together can lie from it, so in
// float32 their squares keep the digits that 16-bit elements have.
struct Deviations {
  float sum, square;
};

__device__ __forceinline__ RowStatistics statistics_of(float first, const Deviations& row, int D, float epsilon) {
  const float width = static_cast<float>(D), rest = row.sum / width;
  const float variance = fmaxf(row.square / width - rest * rest, 0);
  return {first, rest, 1 / sqrtf(variance + epsilon)};
}

// Sums them up from what the threads of a block have copied to a tile.
template <class Op, class Copy>
class DeviationSums {
 public:
  template <class Block>
  __device__ __forceinline__ DeviationSums(const Op& op, const Block& block) : op_(op), wanted_(op.has_norm) {
#pragma unroll
    for (int copy = 0; copy < Copy::kCopies; ++copy) {
      const int64_t row = min(block.first_row() + Copy::row() + copy * Copy::kRowStep, op.R - 1);
      first_[copy] = wanted_ ? to_float(op.left[row * op.left_stride]) : 0;
      sums_[copy] = squares_[copy] = 0;
    }
  }

  __device__ __forceinline__ bool wants(int column) const { return wanted_ && column < op_.D; }

  template <class T>
  __device__ __forceinline__ void look(T* vector, int copy, int) {
    float values[8];
    unpack(load(vector), values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float deviation = values[i] - first_[copy];
      sums_[copy] += deviation;
      squares_[copy] = fmaf(deviation, deviation, squares_[copy]);
    }
  }

  __device__ __forceinline__ double share() const { return 0; }

 protected:
  // Of all lanes that share a row.
  __device__ __forceinline__ Deviations deviations_of(int copy) const {
    float sum = sums_[copy], square = squares_[copy];
#pragma unroll
    for (int lanes = Copy::kLanes / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      square += __shfl_xor_sync(0xffffffffu, square, lanes);
    }
    return {sum, square};
  }

  const Op& op_;
  const bool wanted_;
  float first_[Copy::kCopies];

 private:
  float sums_[Copy::kCopies], squares_[Copy::kCopies];
};

}  // namespace petl::cuda
