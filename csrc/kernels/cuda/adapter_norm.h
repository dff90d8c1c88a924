// LayerNorm of the rows that the adapter's first product takes, while they are on their way to it.
#pragma once
#include "kernels/cuda/adapter_packing.h"
#include "kernels/cuda/row_deviations.h"
#include "kernels/cuda/shape.h"
#include "kernels/cuda/tile.h"

namespace petl::cuda {

// Finds the rows' statistics while the product takes the rows as they are.
template <class Op, class Copy>
class FindStatistics : public DeviationSums<Op, Copy> {
 public:
  using DeviationSums<Op, Copy>::DeviationSums;

  template <class Block>
  __device__ __forceinline__ void end(const Block& block) const {
#pragma unroll
    for (int copy = 0; copy < Copy::kCopies; ++copy) {
      const RowStatistics statistics = statistics_of(copy);
      const int row = Copy::row() + copy * Copy::kRowStep;
      if (Copy::vector() > 0 || row >= Block::kRows) continue;
      block.row_statistics[row] = statistics;
      if (this->op_.statistics && row < block.rows) this->op_.statistics[block.first_row() + row] = statistics;
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ RowStatistics statistics_of(int copy) const {
    const Deviations row = this->deviations_of(copy);
    if (!this->wanted_) return {0, 0, 1};
    return cuda::statistics_of(this->first_[copy], row, this->op_.D, this->op_.epsilon);
  }
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
