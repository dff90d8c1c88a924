// The operands of a weight's gradient in shared memory: chunks of some rows, of left and of right.
#pragma once
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {

// What is summed beside left^T right.
enum class Extra {
  none,
  left,             // left over the rows
  left_normalized,  // the same; and right is normalized before it is multiplied
  right,            // right over the rows
};

// For tensor cores: every warp has all of inner and 32 columns, so that what it loads of right is its own.
template <class T, int kBlocks_, int kStages_>
struct GradientShape {
  using Element = T;
  static constexpr int kBlocks = kBlocks_;  // of 16 inner columns
  static constexpr int kStages = kStages_;  // chunks that are on their way or in use
  static constexpr int kThreads = 256;
  static constexpr int kInner = 16 * kBlocks, kColumns = kThreads;
  static constexpr int kChunk = 32;  // rows that are multiplied between two barriers
  // So many tiles of columns share out the sums of left: each warp has one block of it.
  static constexpr int kLeftParts = (kBlocks + kThreads / 32 - 1) / (kThreads / 32);
};

// For float32: of the [inner, D] sums a warp has 16-row blocks row_warp and row_warp + kRowWarps, and the 64 columns of
// its column.
template <int kRowWarps_, int kColumnWarps_>
struct FloatGradientShape {
  using Element = float;
  static constexpr int kBlocks = 2, kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kStages = 3;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kInner = 16 * kBlocks * kRowWarps, kColumns = 64 * kColumnWarps;
  static constexpr int kChunk = 16;
  static constexpr int kLeftParts = 1;
};

// The part of the work that a block of threads has.
struct GradientPart {
  int64_t slab, first_row, rows;
  int first_inner, first_column;

  template <class Shape>
  __device__ __forceinline__ static GradientPart of(const GradientTask<typename Shape::Element>& task, int problem) {
    const int64_t slab = static_cast<int>(blockIdx.z) - problem * task.slabs, first_row = slab * task.slab_rows;
    const int64_t rows = max(int64_t{0}, min(task.slab_rows, task.R - first_row));
    return {slab, first_row, rows, static_cast<int>(blockIdx.y) * Shape::kInner,
            static_cast<int>(blockIdx.x) * Shape::kColumns};
  }
};

// Rows of left and right side by side, then the rows' statistics.
template <class Shape>
struct GradientChunk {
  using T = typename Shape::Element;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kRight = Shape::kInner;  // where right begins in a row
  // An odd number of 16-byte words: neither copies nor matrices meet in a bank.
  static constexpr int kStride = Shape::kInner + Shape::kColumns + kVector;
  static constexpr int kStatistics = Shape::kChunk * kStride;
  static constexpr int kElements = kStatistics + Shape::kChunk * static_cast<int>(sizeof(RowStatistics) / sizeof(T));
  static constexpr int kSharedBytes = Shape::kStages * kElements * sizeof(T);
  static_assert(kStride / kVector % 2 == 1 && kElements % kVector == 0, "copies are of 16 bytes");

  // A thread copies 16 bytes here, and every kSpan-th column from here on, of one row of each chunk.
  static constexpr int kRowThreads = Shape::kThreads / Shape::kChunk;
  static constexpr int kSpan = kRowThreads * kVector;
  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x) / kRowThreads; }
  __device__ __forceinline__ static int column() { return static_cast<int>(threadIdx.x) % kRowThreads * kVector; }

  __device__ __forceinline__ static T* begin() { return reinterpret_cast<T*>(shared_memory()); }
  __device__ __forceinline__ static RowStatistics* statistics(int place) {
    return reinterpret_cast<RowStatistics*>(begin() + place * kElements + kStatistics);
  }
};

// A thread's copies. Rows and columns that are not there become zeros, and what a chunk's addresses are made of is
// found once: the loop only adds to it.
template <class Shape, bool kWithStatistics, bool kWholeSectors>
class GradientCopies {
  using T = typename Shape::Element;
  using Chunk = GradientChunk<Shape>;

 public:
  __device__ __forceinline__ GradientCopies(const GradientProblem<T>& problem, const GradientPart& part, int D)
      : left_(problem.left + (part.first_row + Chunk::row()) * problem.left_stride + part.first_inner),
        right_(problem.right + (part.first_row + Chunk::row()) * problem.right_stride + part.first_column +
               Chunk::column()),
        left_step_(Shape::kChunk * problem.left_stride),
        right_step_(Shape::kChunk * problem.right_stride),
        left_columns_(static_cast<int>(problem.left_stride) - part.first_inner),
        right_columns_(D - part.first_column - Chunk::column()),
        left_column_(Chunk::column() - (kWholeSectors ? half_sector(left_, left_columns_) : 0)),
        chunks_with_row_(static_cast<int>((part.rows - Chunk::row() + Shape::kChunk - 1) / Shape::kChunk)),
        target_(keep_address(Chunk::begin() + Chunk::row() * Chunk::kStride + Chunk::column())) {
    left_ += left_column_;
    left_columns_ -= left_column_;
    if constexpr (kWithStatistics) {
      statistics_ = reinterpret_cast<const float*>(problem.statistics + part.first_row);
      rows_ = part.rows;
    }
  }

  // Begins the copies of the next chunk.
  __device__ __forceinline__ void copy(int place) {
    const bool has_row = chunk_ < chunks_with_row_;
    T* const right_target = target_ + place * Chunk::kElements + Chunk::kRight;
    T* const left_target = target_ + place * Chunk::kElements + left_column_ - Chunk::column();
    if (left_column_ >= 0) copy_async(left_target, left_, has_row && left_columns_ > 0);
    copy_row<Shape::kInner, Chunk::kSpan>(left_target, left_, left_column_, has_row ? left_columns_ : 0);
    copy_row<Shape::kColumns, 0>(right_target, right_, Chunk::column(), has_row ? right_columns_ : 0);
    left_ += left_step_;
    right_ += right_step_;
    if constexpr (kWithStatistics) copy_statistics(place);
    ++chunk_;
  }

 private:
  // A row of left may begin in the middle of a sector of 32 bytes. Its copies begin half a sector before it then, where
  // nothing is copied: so they do not cut every sector in two. They reach less far, which must suffice.
  __device__ __forceinline__ static int half_sector(const T* row, int columns) {
    constexpr int kReach = (Shape::kInner + Chunk::kSpan - 1) / Chunk::kSpan * Chunk::kSpan;
    return columns < kReach ? reinterpret_cast<uintptr_t>(row) % 32 / sizeof(T) : 0;
  }

  // Of a row of kWidth columns, from kFirst beyond the thread's first one on.
  template <int kWidth, int kFirst>
  __device__ __forceinline__ static void copy_row(T* target, const T* source, int column, int columns) {
#pragma unroll
    for (int i = kFirst; i < kWidth; i += Chunk::kSpan) {
      if (kWidth - i < Chunk::kSpan && column >= kWidth - i) break;
      copy_async(target + i, source + i, i < columns);
    }
  }

  // They lie back to back, so that a thread copies parts of two rows'. Of rows that are not there they are zeros.
  __device__ __forceinline__ void copy_statistics(int place) {
    float* const target = reinterpret_cast<float*>(Chunk::statistics(place));
    const float* const source = statistics_ + int64_t{3 * Shape::kChunk} * chunk_;
    const int64_t rows = rows_ - int64_t{Shape::kChunk} * chunk_;
    const int own = static_cast<int>(threadIdx.x);
    if (rows >= Shape::kChunk) {
      if (4 * own < 3 * Shape::kChunk) copy_async(target + 4 * own, source + 4 * own, true);
    } else if (own < 3 * Shape::kChunk) {
      target[own] = own < 3 * rows ? source[own] : 0;
    }
  }

  const T *left_, *right_;
  int64_t left_step_, right_step_;
  int left_columns_, right_columns_;  // from the thread's first on
  int left_column_;
  int chunks_with_row_;  // those in which the thread's row is there
  int chunk_ = 0;
  T* target_;
  const float* statistics_;
  int64_t rows_;
};

}  // namespace petl::cuda
