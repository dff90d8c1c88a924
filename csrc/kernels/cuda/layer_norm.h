// LayerNorm's statistics, and values normalized by them.
#pragma once
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

// What LayerNorm does to a row: normalized = (x - mean - mean_rest) * inverse. The mean is in two parts, since float32
// has not the digits for it where the deviations are small beside it.
struct RowStatistics {
  float mean, mean_rest, inverse;

  __device__ __forceinline__ float normalized(float x) const { return (x - mean - mean_rest) * inverse; }
};

// The statistics of a few rows at once, by one warp: their loads are under way together. Deviations are from the mean
// as it was found first, and their own mean is what was missing from it. Rows from `rows` on are not there.
template <class T, int kRows>
__device__ __forceinline__ void find_statistics(const T* first, int64_t stride, int rows, int D, float epsilon,
                                                RowStatistics (&statistics)[kRows]) {
  const int begin = static_cast<int>(threadIdx.x) % 32 * 8;
  const float width = static_cast<float>(D);
  float sums[kRows] = {}, deviations[kRows] = {}, squares[kRows] = {};
  const auto for_each = [&](auto visit) {
    for (int column = begin; column < D; column += 256) {
      Packed<T> packed[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) packed[row] = load_if(row < rows, first + row * stride + column);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float values[8];
        unpack(packed[row], values);
#pragma unroll
        for (int i = 0; i < 8; ++i) visit(row, values[i]);
      }
    }
  };
  for_each([&](int row, float value) { sums[row] += value; });
#pragma unroll
  for (int row = 0; row < kRows; ++row) statistics[row].mean = sum_warp(sums[row]) / width;
  for_each([&](int row, float value) {
    const float deviation = value - statistics[row].mean;
    deviations[row] += deviation;
    squares[row] += deviation * deviation;
  });
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float rest = sum_warp(deviations[row]) / width;
    const float variance = sum_warp(squares[row]) / width - rest * rest;
    statistics[row].mean_rest = rest;
    statistics[row].inverse = 1 / sqrtf(fmaxf(variance, 0) + epsilon);
  }
}

}  // namespace petl::cuda
