// A block's part of left^T right, chunk by chunk: on tensor cores for 16 bits, by plain multiply-adds for float32.
#pragma once
#include "kernels/cuda/gradient_chunks.h"
#include "kernels/cuda/product.h"

namespace petl::cuda {

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, Bfloat16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack_pair(uint32_t pair, Float16) { return unpack_float16(pair); }

// Two ones.
__device__ __forceinline__ constexpr uint32_t pair_of_ones(Bfloat16) { return 0x3f803f80u; }
__device__ __forceinline__ constexpr uint32_t pair_of_ones(Float16) { return 0x3c003c00u; }

template <class Shape, Extra kExtra>
class TensorCoreSums {
  using T = typename Shape::Element;
  using Chunk = GradientChunk<Shape>;
  static constexpr bool kSumsLeft = kExtra == Extra::left || kExtra == Extra::left_normalized;
  static constexpr bool kSumsRight = kExtra == Extra::right;
  static constexpr int kColumnSums = kSumsRight ? 2 : kSumsLeft ? 1 : 0;

 public:
  static constexpr bool kReadsStatistics = kExtra == Extra::left_normalized;

  __device__ __forceinline__ TensorCoreSums(const GradientProblem<T>&, const GradientPart&, int) {
    left_ = keep_address(Chunk::begin() + (lane() % 8 + lane() / 16 * 8) * Chunk::kStride + lane() / 8 % 2 * 8);
    right_ =
        keep_address(Chunk::begin() + Chunk::kRight + lane() % 16 * Chunk::kStride + 32 * warp() + lane() / 16 * 8);
#pragma unroll
    for (int i = 0; i < 16 * Shape::kBlocks; ++i) sums_[i / 16][i / 4 % 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < 4 * kColumnSums; ++i) column_sums_[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ void arrive(int) const {}

  __device__ __forceinline__ void multiply(int place) {
    const int chunk = place * Chunk::kElements;
#pragma unroll
    for (int k = 0; k < Shape::kChunk; k += 16) {
      uint32_t right[2][4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        load_matrices_transposed(right[pair], right_ + chunk + k * Chunk::kStride + 16 * pair);
      }
      if constexpr (kReadsStatistics) normalize(right, Chunk::statistics(place) + k);
#pragma unroll
      for (int block = 0; block < Shape::kBlocks; ++block) {
        uint32_t left[4];
        load_matrices_transposed(left, left_ + chunk + k * Chunk::kStride + 16 * block);
        multiply_pairs(sums_[block], left, right);
      }
      if constexpr (kSumsLeft) {
        uint32_t left[4];
        load_matrices_transposed(left, left_ + chunk + k * Chunk::kStride + 16 * block_of_sums());
        sum_columns(left, 0);
      }
      if constexpr (kSumsRight) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          sum_columns({right[pair][0], right[pair][2], right[pair][1], right[pair][3]}, pair);
        }
      }
    }
  }

  __device__ __forceinline__ void write(const GradientProblem<T>& problem, const GradientPart& part, int inner,
                                        int D) const {
    const int first = part.first_inner + lane() / 4;
    const int column = part.first_column + 32 * warp() + lane() % 4 * 2;
    float* row = problem.sums + (part.slab * inner + first) * D + column;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kBlocks; ++i) {
      if (first + 8 * i < inner) write_row(row, D - column, sums_[i / 2], i % 2);
      row += int64_t{8} * D;
    }
    if (kExtra != Extra::none && lane() % 4 == 0) write_column_sums(problem, part, inner, D);
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
  // Some warps have none: they read on in the chunk, and what they sum is not kept.
  __device__ __forceinline__ static int block_of_sums() {
    return warp() + Shape::kThreads / 32 * static_cast<int>(blockIdx.x % Shape::kLeftParts);
  }

  // Sums of four neighboring 8-column blocks.
  __device__ __forceinline__ static void multiply_pairs(float (&sums)[4][4], const uint32_t (&left)[4],
                                                        const uint32_t (&right)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_step(sums[i], left, {right[i / 2][2 * (i % 2)], right[i / 2][2 * (i % 2) + 1]}, T{});
    }
  }

  // Adds to column_sums_[i] what is the sum of sixteen columns, those of which a product makes sixteen rows. Not one
  // product for several i, which zeros keep apart: they would not, where there is an infinity.
  __device__ __forceinline__ void sum_columns(const uint32_t (&columns)[4], int i) {
    multiply_step(column_sums_[i], columns, {pair_of_ones(T{}), pair_of_ones(T{})}, T{});
  }

  __device__ __forceinline__ void write_column_sums(const GradientProblem<T>& problem, const GradientPart& part,
                                                    int inner, int D) const {
#pragma unroll
    for (int i = 0; i < 2 * kColumnSums; ++i) {
      const float sum = column_sums_[i / 2][i % 2 * 2];
      const int line = lane() / 4 + 8 * (i % 2);
      const int left = part.first_inner + 16 * block_of_sums() + line;
      const int right = part.first_column + 32 * warp() + 16 * (i / 2) + line;
      if (kSumsLeft && blockIdx.x < Shape::kLeftParts && block_of_sums() < Shape::kBlocks && left < inner) {
        problem.left_sums[part.slab * inner + left] = sum;
      }
      if (kSumsRight && blockIdx.y == 0 && right < D) problem.right_sums[part.slab * D + right] = sum;
    }
  }

  // The thread's parts of right lie in rows 2 t and 2 t + 1, and in those that come 8 later.
  __device__ __forceinline__ static void normalize(uint32_t (&right)[2][4], const RowStatistics* statistics) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowStatistics* const rows = statistics + lane() % 4 * 2 + 8 * half;
      const RowStatistics even = rows[0], odd = rows[1];
      const float2 rest = {-even.mean_rest * even.inverse, -odd.mean_rest * odd.inverse};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& part = right[i / 2][2 * (i % 2) + half];
        const float2 values = unpack_pair(part, T{});
        part = pack_pair(fmaf(values.x - even.mean, even.inverse, rest.x),
                         fmaf(values.y - odd.mean, odd.inverse, rest.y), T{});
      }
    }
  }

  __device__ __forceinline__ static void write_row(float* row, int columns, const float (&sums)[4][4], int half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = {sums[i][2 * half], sums[i][2 * half + 1]};
      if (8 * i < columns) *reinterpret_cast<float2*>(row + 8 * i) = pair;
    }
  }

  const T *left_, *right_;
  float sums_[Shape::kBlocks][4][4], column_sums_[kColumnSums + 1][4];
};

template <class Shape, Extra kExtra>
class FloatSums {
  using Chunk = GradientChunk<Shape>;
  static constexpr bool kSumsLeft = kExtra == Extra::left || kExtra == Extra::left_normalized;
  static constexpr bool kSumsRight = kExtra == Extra::right;
  static constexpr bool kNormalizes = kExtra == Extra::left_normalized;
  static constexpr int kStep = 4;  // depth of a step
  static constexpr int kBlockStep = 16 * Shape::kRowWarps;

 public:
  static constexpr bool kReadsStatistics = false;  // from the chunks

  __device__ __forceinline__ FloatSums(const GradientProblem<float>& problem, const GradientPart& part, int inner)
      : blocks_((inner - part.first_inner - 16 * row_warp() + kBlockStep - 1) / kBlockStep),
        statistics_(problem.statistics + part.first_row + Chunk::row()),
        chunks_(static_cast<int>((part.rows - Chunk::row() + Shape::kChunk - 1) / Shape::kChunk)) {
    sums_.clear();
    if constexpr (kNormalizes) load_statistics();
  }

  // Each thread normalizes what it copied itself, with statistics that it has loaded one chunk ahead.
  __device__ __forceinline__ void arrive(int place) {
    if constexpr (kNormalizes) {
      const int begin = place * Chunk::kElements + Chunk::row() * Chunk::kStride + Chunk::kRight;
      float* const row = Chunk::begin() + begin + Chunk::column();
#pragma unroll
      for (int i = 0; i < Shape::kColumns; i += Chunk::kSpan) {
        float4& vector = *reinterpret_cast<float4*>(row + i);
        vector = {row_.normalized(vector.x), row_.normalized(vector.y), row_.normalized(vector.z),
                  row_.normalized(vector.w)};
      }
      --chunks_;
      statistics_ += Shape::kChunk;
      load_statistics();
    }
  }

  __device__ __forceinline__ void multiply(int place) {
    const float* const chunk = Chunk::begin() + place * Chunk::kElements;
    if (blocks_ > 1) {
      multiply_chunk<2>(chunk);
    } else if (blocks_ == 1) {
      multiply_chunk<1>(chunk);
    }
    if constexpr (kSumsLeft) {
      if (blockIdx.x == 0) add_columns<Shape::kInner>(chunk);
    }
    if constexpr (kSumsRight) {
      if (blockIdx.y == 0) add_columns<Shape::kColumns>(chunk + Chunk::kRight);
    }
    depth_ = (depth_ + Shape::kChunk) % kShortSum;
    sums_.end_of(depth_);
  }

  __device__ __forceinline__ void write(const GradientProblem<float>& problem, const GradientPart& part, int inner,
                                        int D) {
    const Sums<Shape::kBlocks, 2>& sums = sums_.finish();
    const int first = part.first_inner + 16 * row_warp() + lane() / 4;
    const int column = part.first_column + 64 * column_warp() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kBlocks; ++i) {
      const int line = first + kBlockStep * (i / 2) + 8 * (i % 2);
      if (line >= inner) continue;
      float* const row = problem.sums + (part.slab * inner + line) * D + column;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float (&parts)[4] = sums.parts[i / 2][j / 4][j % 4];
        if (column + 8 * j < D) *reinterpret_cast<float2*>(row + 8 * j) = {parts[i % 2 * 2], parts[i % 2 * 2 + 1]};
      }
    }
    const int own = threadIdx.x, left = part.first_inner + own, right = part.first_column + own;
    if (kSumsLeft && blockIdx.x == 0 && own < Shape::kInner && left < inner) {
      problem.left_sums[part.slab * inner + left] = column_sum_;
    }
    if (kSumsRight && blockIdx.y == 0 && own < Shape::kColumns && right < D) {
      problem.right_sums[part.slab * D + right] = column_sum_;
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int row_warp() { return threadIdx.x / 32 / Shape::kColumnWarps; }
  __device__ __forceinline__ static int column_warp() { return threadIdx.x / 32 % Shape::kColumnWarps; }

  // Rows that are not there stay the zeros that they are.
  __device__ __forceinline__ void load_statistics() { row_ = chunks_ > 0 ? *statistics_ : RowStatistics{}; }

  template <int kBlocks>
  __device__ __forceinline__ void multiply_chunk(const float* chunk) {
    const float* left = chunk + 16 * row_warp() + lane() / 4;
    const float* right = chunk + Chunk::kRight + 64 * column_warp() + lane() % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < Shape::kChunk; k += kStep) {
      float4 left_parts[kBlocks][2];
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const float* column = left + kBlockStep * (i / 2) + 8 * (i % 2);
        left_parts[i / 2][i % 2] = {column[0], column[Chunk::kStride], column[2 * Chunk::kStride],
                                    column[3 * Chunk::kStride]};
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float right_parts[kStep][2];
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const float2 pair = *reinterpret_cast<const float2*>(right + i * Chunk::kStride + 8 * j);
          right_parts[i][0] = pair.x;
          right_parts[i][1] = pair.y;
        }
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          multiply_step(sums_.sums.parts[block][j / 4][j % 4], left_parts[block], right_parts);
        }
      }
      left += kStep * Chunk::kStride;
      right += kStep * Chunk::kStride;
    }
  }

  // The chunk's sum of the thread's column.
  template <int kWidth>
  __device__ __forceinline__ void add_columns(const float* tile) {
    const int column = threadIdx.x;
    if (column >= kWidth) return;
    float sum = 0;
#pragma unroll
    for (int row = 0; row < Shape::kChunk; ++row) sum += tile[row * Chunk::kStride + column];
    column_sum_ += sum;
  }

  int blocks_;  // of the warp, that hold any of inner
  const RowStatistics* statistics_;
  int chunks_;  // still to come in which the thread's row is there
  RowStatistics row_;
  int depth_ = 0;
  LongSums<float, Shape::kBlocks, 2> sums_;
  float column_sum_ = 0;
};

}  // namespace petl::cuda
