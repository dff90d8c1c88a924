// How a block of threads divides the work on its rows, and where each thread stands.
#pragma once
#include "kernels/cuda/chunk_product.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

constexpr int kMaxThreadRows = 4;

// How a block of threads divides the work: kRowWarps x kColumnWarps warps; a warp has kRowBlocks blocks of 16 rows, and
// of the inner columns every kColumnWarps-th group of 32, kGroups or one less. With two row blocks, what a warp loads
// of the weights from shared memory serves twice as many products.
template <class T, int kRowBlocks_, int kGroups_, int kRowWarps_, int kColumnWarps_, int kResidentBlocks_>
struct Shape {
  using Self = Shape;
  using Element = T;
  static constexpr int kRowBlocks = kRowBlocks_, kGroups = kGroups_, kRowWarps = kRowWarps_,
                       kColumnWarps = kColumnWarps_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  // Blocks that a multiprocessor shall be able to run at once: a bound for the compiler's use of registers.
  static constexpr int kResidentBlocks = kResidentBlocks_;
  static constexpr int kRows = 16 * kRowBlocks * kRowWarps;
  static constexpr int kInner = 32 * kGroups * kColumnWarps;
  // The fewest inner columns, in whole groups, with which every warp has kGroups of them or one less; the smallest
  // shape takes all that are fewer.
  static constexpr int kLeastInner = kInner == 64 ? 32 : 32 * ((kGroups - 1) * kColumnWarps + 1);
  // Of the columns of D that a block sums at once.
  static constexpr int kSecondGroups = kColumnWarps == 1 ? 2 : kColumnWarps == 4 ? 1 : kRowBlocks;
  static constexpr int kSecondColumns = 32 * kColumnWarps * kSecondGroups;
};

// Where a thread stands.
template <class Shape>
struct Block {
  static constexpr int kRows = Shape::kRows;
  // The lines of one thread are row(0), row(1), ...
  static constexpr int kThreadRows = 2 * Shape::kRowBlocks;

  float* row_scratch;             // [kRows, kColumnWarps]
  double* block_scratch;          // one per warp
  RowStatistics* row_statistics;  // [kRows]
  int rows;                       // of the block's that there are

  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
  // Warps whose numbers differ by 4 share a part of the multiprocessor; those of the first columns, which may have a
  // group more to multiply, are spread over all four.
  __device__ __forceinline__ static int row_warp() { return warp() % Shape::kRowWarps; }
  __device__ __forceinline__ static int column_warp() { return warp() / Shape::kRowWarps; }
  __device__ __forceinline__ static int64_t first_row() { return int64_t{blockIdx.x} * Shape::kRows; }
  __device__ __forceinline__ static int first_of_warp() { return 16 * Shape::kRowBlocks * row_warp(); }
  __device__ __forceinline__ static int local_row(int line) {
    return first_of_warp() + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * line;
  }
  __device__ __forceinline__ static int64_t row(int line) { return first_row() + local_row(line); }
  __device__ __forceinline__ bool has(int line) const { return local_row(line) < rows; }
  // The first of the thread's eight columns in a group of 32.
  __device__ __forceinline__ static int column(int group) {
    return 32 * (column_warp() + group * Shape::kColumnWarps) + static_cast<int>(threadIdx.x) % 4 * 8;
  }
  // The warp's groups of 32 columns that hold any of `columns` columns.
  __device__ __forceinline__ static Groups groups(int columns) {
    const int all = (columns + 31) / 32;
    return {column_warp(), Shape::kColumnWarps, (all - column_warp() + Shape::kColumnWarps - 1) / Shape::kColumnWarps};
  }

  // Calls visit(line, column, values) for the thread's sums by eights; what it changes is kept.
  template <class Visit>
  __device__ __forceinline__ static void for_each(Sums<Shape::kRowBlocks, Shape::kGroups>& sums, int columns,
                                                  Visit visit) {
    const Groups active = groups(columns);
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      if (group >= active.count) break;
#pragma unroll
      for (int line = 0; line < kThreadRows; ++line) {
        float values[8];
        sums.get(group, line, values);
        visit(line, column(group), values);
        sums.set(group, line, values);
      }
    }
  }

  // Calls visit(group, column) for the thread's sums by groups, of which it has eight columns.
  template <class Visit>
  __device__ __forceinline__ static void for_each_group(int columns, Visit visit) {
    const int count = groups(columns).count;
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      if (group < count) visit(group, column(group));
    }
  }

  // Combines what the threads of a row have; all threads of the block must call it.
  template <int kSize, class Combine>
  __device__ __forceinline__ void reduce_rows(float (&values)[kSize], Combine combine) const {
    static_assert(kSize >= kThreadRows, "one value per line");
#pragma unroll
    for (int line = 0; line < kThreadRows; ++line) values[line] = reduce_quad(values[line], combine);
    if constexpr (Shape::kColumnWarps > 1) {
      __syncthreads();
#pragma unroll
      for (int line = 0; line < kThreadRows; ++line) {
        if (threadIdx.x % 4 == 0) row_scratch[local_row(line) * Shape::kColumnWarps + column_warp()] = values[line];
      }
      __syncthreads();
#pragma unroll
      for (int line = 0; line < kThreadRows; ++line) {
        const float* row_values = row_scratch + local_row(line) * Shape::kColumnWarps;
        values[line] = row_values[0];
#pragma unroll
        for (int warp = 1; warp < Shape::kColumnWarps; ++warp) values[line] = combine(values[line], row_values[warp]);
      }
    }
  }
};

// The shapes, by the number of inner columns. What bounds them is a thread's registers for the sums: 16 for every block
// of 16 rows and group of 32 columns of its warp, twice that for float32, whose sums are in two levels.
template <class T, int kInner>
struct ShapeFor;
template <class T>
struct ShapeFor<T, 64> : Shape<T, 1, 2, 4, 1, 3> {};
template <class T>
struct ShapeFor<T, 96> : Shape<T, 1, 3, 4, 1, 3> {};
template <class T>
struct ShapeFor<T, 128> : Shape<T, 1, 4, 4, 1, 3> {};
template <class T>
struct ShapeFor<T, 192> : Shape<T, 2, 3, 4, 2, 1> {};
template <class T>
struct ShapeFor<T, 256> : Shape<T, 2, 4, 4, 2, 1> {};
template <class T>
struct ShapeFor<T, 384> : Shape<T, 2, 3, 2, 4, 1> {};
template <class T>
struct ShapeFor<T, 512> : Shape<T, 2, 4, 2, 4, 1> {};
template <>
struct ShapeFor<float, 64> : Shape<float, 1, 1, 2, 2, 3> {};
template <>
struct ShapeFor<float, 96> : Shape<float, 1, 2, 2, 2, 3> {};
template <>
struct ShapeFor<float, 128> : ShapeFor<float, 96> {};
template <>
struct ShapeFor<float, 192> : Shape<float, 1, 3, 4, 2, 1> {};
template <>
struct ShapeFor<float, 256> : Shape<float, 1, 4, 4, 2, 1> {};
template <>
struct ShapeFor<float, 384> : Shape<float, 1, 3, 2, 4, 1> {};
template <>
struct ShapeFor<float, 512> : Shape<float, 1, 4, 2, 4, 1> {};

// Calls function with the smallest shape that holds the inner columns. Of the sizes alone, so that every device and
// every run adds in the same order.
template <class T, class Function>
auto with_shape(int64_t inner, const Function& function) {
  if (inner <= 64) return function(typename ShapeFor<T, 64>::Self());
  if (inner <= 96) return function(typename ShapeFor<T, 96>::Self());
  if (inner <= 128) return function(typename ShapeFor<T, 128>::Self());
  if (inner <= 192) return function(typename ShapeFor<T, 192>::Self());
  if (inner <= 256) return function(typename ShapeFor<T, 256>::Self());
  if (inner <= 384) return function(typename ShapeFor<T, 384>::Self());
  return function(typename ShapeFor<T, 512>::Self());
}

// For up to 64 inner columns, blocks of twice as many rows: what a block copies of the weights serves them all.
template <class T>
struct WideShape : Shape<T, 2, 2, 4, 1, 2> {};
// From so many rows on. Below, there would be too few blocks for a large GPU.
constexpr int64_t kManyRows = 32'768;

// The same for forward, which in this shape has registers enough.
template <class T, class Function>
auto with_forward_shape(int64_t R, int64_t inner, const Function& function) {
  if constexpr (sizeof(T) == 2) {
    if (inner > 32 && inner <= 64 && R >= kManyRows) return function(typename WideShape<T>::Self());
  }
  return with_shape<T>(inner, function);
}

}  // namespace petl::cuda
