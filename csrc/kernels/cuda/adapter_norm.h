// LayerNorm of the rows that the adapter's first product takes, while they are on their way to it.
#pragma once
#include "kernels/cuda/adapter_packing.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/cuda/shape.h"
#include "kernels/cuda/tile.h"

namespace petl::cuda {

// Finds the rows' statistics while the product takes the rows as they are. Deviations are from the row's first element:
// no more than all the others together can lie from it, so in float32 their squares keep the digits that 16-bit
// elements have.
template <class Op, class Copy>
class FindStatistics {
 public:
  template <class Block>
  __device__ __forceinline__ FindStatistics(const Op& op, const Block& block) : op_(op), wanted_(op.has_norm) {
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

  template <class Block>
  __device__ __forceinline__ void end(const Block& block) const {
#pragma unroll
    for (int copy = 0; copy < Copy::kCopies; ++copy) {
      const RowStatistics statistics = statistics_of(copy);
      const int row = Copy::row() + copy * Copy::kRowStep;
      if (Copy::vector() > 0 || row >= Block::kRows) continue;
      block.row_statistics[row] = statistics;
      if (op_.statistics && row < block.rows) op_.statistics[block.first_row() + row] = statistics;
    }
    __syncthreads();
  }

  __device__ __forceinline__ double share() const { return 0; }

 private:
  // By the lanes that share a row.
  __device__ __forceinline__ RowStatistics statistics_of(int copy) const {
    float sum = sums_[copy], square = squares_[copy];
#pragma unroll
    for (int lanes = Copy::kLanes / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      square += __shfl_xor_sync(0xffffffffu, square, lanes);
    }
    if (!wanted_) return {0, 0, 1};
    const float width = static_cast<float>(op_.D), rest = sum / width;
    const float variance = fmaxf(square / width - rest * rest, 0);
    return {first_[copy], rest, 1 / sqrtf(variance + op_.epsilon)};
  }

  const Op& op_;
  const bool wanted_;
  float first_[Copy::kCopies], sums_[Copy::kCopies], squares_[Copy::kCopies];
};

// Finds the statistics beforehand, and normalizes each vector of floats where it has been copied to.
template <class Op, class Copy>
class Normalize {
 public:
  template <class Block>
  __device__ __forceinline__ Normalize(const Op& op, const Block& block)
      : op_(op), block_statistics_(block.row_statistics) {
    if (!op.has_norm) {
      if (op.statistics) keep_nothing(block);
      return;
    }
    constexpr int kTogether = 4;
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int row = kTogether * block.warp(); row < block.rows; row += kTogether * warps) {
      RowStatistics values[kTogether];
      const int64_t first = block.first_row() + row;
      const int rows = min(block.rows - row, kTogether);
      find_statistics(op.left + first * op.left_stride, op.left_stride, rows, op.D, op.epsilon, values);
      if (threadIdx.x % 32 == 0) keep(values, row, first, rows);
      __syncwarp();
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool wants(int column) const { return op_.has_norm && column < op_.D; }

  __device__ __forceinline__ void look(float* vector, int copy, int column) const {
    const int row = Copy::row() + copy * Copy::kRowStep;
    const RowStatistics statistics = block_statistics_[row];
    float4& values = *reinterpret_cast<float4*>(vector);
    const float4 weight = *reinterpret_cast<const float4*>(op_.vectors.norm_weight + column);
    values = {statistics.normalized(values.x) * weight.x, statistics.normalized(values.y) * weight.y,
              statistics.normalized(values.z) * weight.z, statistics.normalized(values.w) * weight.w};
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block&) const {}
  __device__ __forceinline__ double share() const { return 0; }

 private:
  template <class Block>
  __device__ __forceinline__ void keep_nothing(const Block& block) const {
    for (int row = threadIdx.x; row < block.rows; row += blockDim.x) {
      op_.statistics[block.first_row() + row] = {0, 0, 1};
    }
  }

  template <int kRows>
  __device__ __forceinline__ void keep(const RowStatistics (&values)[kRows], int row, int64_t first, int rows) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      block_statistics_[row + i] = values[i];
      if (op_.statistics) op_.statistics[first + i] = values[i];
    }
  }

  const Op& op_;
  RowStatistics* block_statistics_;
};

// Makes norm(x) down^T, without the norm's bias, of the thread's sums.
template <class T, int kLines>
class ProductScale {
 public:
  template <class Op, class Block>
  __device__ __forceinline__ ProductScale(const Op& op, const Block& block) {
    if constexpr (kFolds<T>) {
      const float unscale = *op.vectors.unscale;
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        rows_[line] = block.row_statistics[block.local_row(line)];
        rows_[line].inverse *= unscale;
      }
    }
  }

  __device__ __forceinline__ void apply(int line, const float (&unit_sums)[8], float (&values)[8]) const {
    if constexpr (kFolds<T>) {
      const RowStatistics& row = rows_[line];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float centered = fmaf(-row.mean, unit_sums[i], values[i]);
        values[i] = row.inverse * fmaf(-row.mean_rest, unit_sums[i], centered);
      }
    }
  }

 private:
  RowStatistics rows_[kLines];
};

}  // namespace petl::cuda
