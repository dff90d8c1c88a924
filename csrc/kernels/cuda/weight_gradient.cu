#include "kernels/cuda/product.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {

// kRowWarps x kColumnWarps warps; of the [inner, D] sums a warp has 16-row blocks row_warp, row_warp + kRowWarps, ...
// and the 64 columns of its column.
template <class T, int kBlocks_, int kRowWarps_, int kColumnWarps_>
struct GradientShape {
  using Element = T;
  static constexpr int kBlocks = kBlocks_, kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kInner = 16 * kBlocks * kRowWarps, kColumns = 64 * kColumnWarps;
  // Rows that are multiplied between two barriers.
  static constexpr int kChunk = sizeof(T) == 2 ? 32 : 16;
  static constexpr int kStages = 3;
  static constexpr int kPadding = 16 / sizeof(T);
  static constexpr int kLeftStride = kInner + kPadding, kRightStride = kColumns + kPadding;
  static constexpr int kStageElements = kChunk * (kLeftStride + kRightStride);
  static constexpr int kSharedBytes = kStages * kStageElements * sizeof(T);
};

// sums of blocks 0, 1, ... [16, 64] += left^T right over kChunk rows. Block i's columns of left [rows, ...] begin at
// i * left_step; right [rows, 64] is loaded once for all blocks.
template <int kChunk, class T, int kBlocks>
__device__ __forceinline__ void multiply_transposed(Sums<kBlocks, 2>& sums, Tile<const T> left, int left_step,
                                                    Tile<const T> right, int blocks) {
  const int lane = threadIdx.x % 32;
  const T* left_row = left.data + (lane % 8 + lane / 16 * 8) * left.stride + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kChunk; k += 16) {
    uint32_t parts[4][4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      load_right<T, Order::depth>(parts[pair], right.data + k * right.stride + 16 * pair, right.stride);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block >= blocks) break;
      uint32_t left_parts[4];
      load_matrices_transposed(left_parts, left_row + k * left.stride + block * left_step);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float (&pair_sums)[4][4] = sums.parts[block][pair / 2];
        multiply_step(pair_sums[2 * (pair % 2)], left_parts, {parts[pair][0], parts[pair][1]}, T{});
        multiply_step(pair_sums[2 * (pair % 2) + 1], left_parts, {parts[pair][2], parts[pair][3]}, T{});
      }
    }
  }
}

template <int kChunk, int kBlocks>
__device__ __forceinline__ void multiply_transposed(Sums<kBlocks, 2>& sums, Tile<const float> left, int left_step,
                                                    Tile<const float> right, int blocks) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if (block >= blocks) break;
#pragma unroll 1
    for (int k = 0; k < kChunk; k += 4) {
      const float* row = left.data + k * left.stride + block * left_step + g;
      const float4 left_parts[2] = {{row[0], row[left.stride], row[2 * left.stride], row[3 * left.stride]},
                                    {row[8], row[left.stride + 8], row[2 * left.stride + 8], row[3 * left.stride + 8]}};
#pragma unroll
      for (int columns = 0; columns < 8; ++columns) {
        float parts[4][2];
        load_right<Order::depth>(parts, right.data + k * right.stride + 8 * columns, right.stride);
        multiply_step(sums.parts[block][columns / 4][columns % 4], left_parts, parts);
      }
    }
  }
}

template <class Shape>
class GradientBlock {
  using T = typename Shape::Element;

 public:
  __device__ __forceinline__ explicit GradientBlock(const GradientTask<T>& task)
      : task_(task),
        problem_(task.problems[blockIdx.z / task.slabs]),
        slab_(blockIdx.z % task.slabs),
        begin_(slab_ * task.slab_rows),
        end_(begin_ + task.slab_rows < task.R ? begin_ + task.slab_rows : task.R),
        first_inner_(blockIdx.y * Shape::kInner),
        first_column_(blockIdx.x * Shape::kColumns),
        tiles_(reinterpret_cast<T*>(shared_memory())) {}

  __device__ __forceinline__ void run() {
    const int chunks = end_ > begin_ ? static_cast<int>((end_ - begin_ + Shape::kChunk - 1) / Shape::kChunk) : 0;
    for (int chunk = 0; chunk < Shape::kStages - 1; ++chunk) {
      if (chunk < chunks) copy(chunk);
      commit_copies();
    }
    clear();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_copies<Shape::kStages - 2>();
      if (problem_.statistics) normalize_right(chunk);
      __syncthreads();
      if (chunk + Shape::kStages - 1 < chunks) copy(chunk + Shape::kStages - 1);
      commit_copies();
      multiply(chunk);
      if (problem_.left_sums && blockIdx.x == 0)
        add_columns(left_tile(chunk), Shape::kLeftStride, Shape::kInner, left_sums_);
      if (problem_.right_sums && blockIdx.y == 0)
        add_columns(right_tile(chunk), Shape::kRightStride, Shape::kColumns, right_sums_);
      sums_.end_of((chunk + 1) * Shape::kChunk);
    }
    wait_for_copies<0>();
    write(sums_.finish());
  }

 private:
  static constexpr int kSumsPerThread =
      ((Shape::kInner > Shape::kColumns ? Shape::kInner : Shape::kColumns) + Shape::kThreads - 1) / Shape::kThreads;

  __device__ __forceinline__ T* left_tile(int chunk) const {
    return tiles_ + chunk % Shape::kStages * Shape::kStageElements;
  }
  __device__ __forceinline__ T* right_tile(int chunk) const {
    return left_tile(chunk) + Shape::kChunk * Shape::kLeftStride;
  }

  // Calls visit(row of the chunk, column of the tile) for the vectors of eight of a tile that this thread copies.
  template <int kWidth, class Visit>
  __device__ __forceinline__ static void for_each_vector(Visit visit) {
    constexpr int kVectors = Shape::kChunk * kWidth / 8;
#pragma unroll
    for (int i = 0; i < (kVectors + Shape::kThreads - 1) / Shape::kThreads; ++i) {
      const int vector = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      if (kVectors % Shape::kThreads != 0 && vector >= kVectors) break;
      visit(vector / (kWidth / 8), vector % (kWidth / 8) * 8);
    }
  }

  __device__ __forceinline__ static void copy_vector(T* target, const T* source, bool valid) {
#pragma unroll
    for (int i = 0; i < 8; i += 16 / sizeof(T)) copy_async(target + i, source + i, valid);
  }

  __device__ __forceinline__ void copy(int chunk) const {
    for_each_vector<Shape::kInner>([&](int chunk_row, int column) {
      const int64_t row = begin_ + int64_t{chunk} * Shape::kChunk + chunk_row;
      const bool valid = row < end_ && first_inner_ + column < problem_.left_stride;
      copy_vector(left_tile(chunk) + chunk_row * Shape::kLeftStride + column,
                  valid ? problem_.left + row * problem_.left_stride + first_inner_ + column : problem_.left, valid);
    });
    for_each_vector<Shape::kColumns>([&](int chunk_row, int column) {
      const int64_t row = begin_ + int64_t{chunk} * Shape::kChunk + chunk_row;
      const bool valid = row < end_ && first_column_ + column < task_.D;
      copy_vector(right_tile(chunk) + chunk_row * Shape::kRightStride + column,
                  valid ? problem_.right + row * problem_.right_stride + first_column_ + column : problem_.right,
                  valid);
    });
  }

  // Each thread normalizes what it copied itself.
  __device__ __forceinline__ void normalize_right(int chunk) const {
    for_each_vector<Shape::kColumns>([&](int chunk_row, int column) {
      const int64_t row = begin_ + int64_t{chunk} * Shape::kChunk + chunk_row;
      if (row >= end_) return;
      const RowStatistics statistics = problem_.statistics[row];
      T* vector = right_tile(chunk) + chunk_row * Shape::kRightStride + column;
      float values[8];
      unpack(load(vector), values);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = statistics.normalized(values[i]);
      store(vector, pack<T>(values));
    });
  }

  __device__ __forceinline__ static int row_warp() { return threadIdx.x / 32 / Shape::kColumnWarps; }
  __device__ __forceinline__ static int column_warp() { return threadIdx.x / 32 % Shape::kColumnWarps; }
  __device__ __forceinline__ static int inner_of(int block) { return 16 * (row_warp() + block * Shape::kRowWarps); }

  __device__ __forceinline__ void multiply(int chunk) {
    const int left_step = 16 * Shape::kRowWarps;
    const int blocks = (task_.inner - first_inner_ - inner_of(0) + left_step - 1) / left_step;
    const Tile<const T> left{left_tile(chunk) + inner_of(0), Shape::kLeftStride};
    const Tile<const T> right{right_tile(chunk) + 64 * column_warp(), Shape::kRightStride};
    multiply_transposed<Shape::kChunk>(sums_.sums, left, left_step, right, blocks);
  }

  __device__ __forceinline__ void clear() {
    sums_.clear();
#pragma unroll
    for (int i = 0; i < kSumsPerThread; ++i) left_sums_[i] = right_sums_[i] = 0;
  }

  // Adds to sums[i] the chunk's sum of column i * kThreads + threadIdx.x.
  __device__ __forceinline__ static void add_columns(const T* tile, int stride, int columns,
                                                     float (&sums)[kSumsPerThread]) {
#pragma unroll
    for (int i = 0; i < kSumsPerThread; ++i) {
      const int column = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      if (column >= columns) break;
      float sum = 0;
      for (int row = 0; row < Shape::kChunk; ++row) sum += to_float(tile[row * stride + column]);
      sums[i] += sum;
    }
  }

  __device__ __forceinline__ void write(const Sums<Shape::kBlocks, 2>& sums) const {
    float* target = problem_.sums + slab_ * task_.inner * task_.D;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int inner = first_inner_ + inner_of(block) + g + 8 * half;
#pragma unroll
        for (int columns = 0; columns < 8; ++columns) {
          const int column = first_column_ + 64 * column_warp() + 8 * columns + 2 * t;
          if (inner >= task_.inner || column >= task_.D) continue;
          const float (&parts)[4] = sums.parts[block][columns / 4][columns % 4];
          *reinterpret_cast<float2*>(target + int64_t{inner} * task_.D + column) = {parts[2 * half],
                                                                                    parts[2 * half + 1]};
        }
      }
    }
    if (problem_.left_sums && blockIdx.x == 0) {
      write_columns(problem_.left_sums + slab_ * task_.inner, first_inner_, Shape::kInner, task_.inner, left_sums_);
    }
    if (problem_.right_sums && blockIdx.y == 0) {
      write_columns(problem_.right_sums + slab_ * task_.D, first_column_, Shape::kColumns, task_.D, right_sums_);
    }
  }

  __device__ __forceinline__ static void write_columns(float* target, int first, int columns, int end,
                                                       const float (&sums)[kSumsPerThread]) {
#pragma unroll
    for (int i = 0; i < kSumsPerThread; ++i) {
      const int column = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      if (column < columns && first + column < end) target[first + column] = sums[i];
    }
  }

  const GradientTask<T>& task_;
  const GradientProblem<T>& problem_;
  const int64_t slab_;
  const int64_t begin_, end_;
  const int first_inner_, first_column_;
  T* tiles_;
  LongSums<T, Shape::kBlocks, 2> sums_;
  float left_sums_[kSumsPerThread], right_sums_[kSumsPerThread];
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    gradient_slabs(const __grid_constant__ GradientTask<typename Shape::Element> task) {
  GradientBlock<Shape>(task).run();
}

template <class T, int kInner>
struct GradientShapeFor;
template <class T>
struct GradientShapeFor<T, 64> : GradientShape<T, 2, 2, 4> {};
template <class T>
struct GradientShapeFor<T, 128> : GradientShape<T, 2, 4, 2> {};
template <class T>
struct GradientShapeFor<T, 256> : GradientShape<T, 4, 4, 2> {};
// Sums of sums need twice the registers.
template <>
struct GradientShapeFor<float, 64> : GradientShape<float, 2, 2, 4> {};
template <>
struct GradientShapeFor<float, 128> : GradientShape<float, 2, 4, 2> {};
template <>
struct GradientShapeFor<float, 256> : GradientShapeFor<float, 128> {};

template <class Shape>
int launch_gradient_shape(Queue queue, const GradientTask<typename Shape::Element>& task, int problems) {
  const dim3 blocks(static_cast<unsigned>(divide_up(task.D, Shape::kColumns)),
                    static_cast<unsigned>(divide_up(task.inner, Shape::kInner)),
                    static_cast<unsigned>(task.slabs * problems));
  return launch(queue, {blocks, Shape::kThreads, Shape::kSharedBytes}, &gradient_slabs<Shape>, task);
}

template <class T>
int launch_gradients(Queue queue, GradientTask<T> task, int problems) {
  task.slab_rows = round_up(divide_up(task.R, task.slabs), 32);
  if (task.inner <= 64) return launch_gradient_shape<GradientShapeFor<T, 64>>(queue, task, problems);
  if (task.inner <= 128) return launch_gradient_shape<GradientShapeFor<T, 128>>(queue, task, problems);
  return launch_gradient_shape<GradientShapeFor<T, 256>>(queue, task, problems);
}

template int launch_gradients(Queue, GradientTask<float>, int);
template int launch_gradients(Queue, GradientTask<Bfloat16>, int);
template int launch_gradients(Queue, GradientTask<Float16>, int);

}  // namespace petl::cuda
