// Two products with something between them, for a tile of rows, in one pass over the rows:
//
//     inner = left first            [rows, inner], summed over the width D in chunks
//     hidden = activate(inner)      in shared memory, rounded to the dtype of the products
//     outer = hidden second         [rows, D], in chunks of columns, which leave as they are summed
//
// Forward and backward of prompt diffusion and of the adapter are all of this kind. An Op says what is special:
//
//     Element                                float, Bfloat16 or Float16: of left, of hidden and of what is written
//     kFirstOrder, kSecondOrder              how the weights lie in their tensors
//     most_resident_blocks(groups)           how many a multiprocessor can run at once without spilling registers
//     kSplits                                whether the first product also sees what rounding its weights leaves out
//     left, left_stride, first, second, R, D, inner
//     begin(block)                           by all threads, before left is transformed; ends in a barrier if it writes
//                                            shared memory
//     kTransforms, transforms(), transform(values, statistics, column)
//                                            what becomes of eight elements of left before they are multiplied
//     activate(sums, block, hidden) -> Terms by all threads; Terms is what write() needs of the thread's rows
//     writes_rows(), multiplies()            whether anything is to be written for rows, and from the second product
//     Inputs, prefetch(row, column), write(row, column, sums, inputs, terms, share)
//     end(block, terms, share)               by all threads; `share` is what write() has added up, of a sum over all
//     rows
#pragma once
#include "kernels/cuda/launch.h"
#include "kernels/cuda/product.h"
#include "kernels/cuda/shape.h"

namespace petl::cuda {

template <class Shape, class Op>
class Sandwich {
  using T = typename Shape::Element;
  using FirstStage = WeightStage<T, Op::kFirstOrder, Shape::kChunk, Shape::kInner, Shape::kThreads>;
  using SecondStage = WeightStage<T, Op::kSecondOrder, Shape::kSecondDepth, Shape::kSecondColumns, Shape::kThreads>;

  static constexpr int kThreadRows = Block<Shape>::kThreadRows;
  static constexpr int kFirstTiles = Op::kSplits ? 2 : 1;
  static constexpr int kFirstBytes =
      (Shape::kStages * Shape::kLeftElements + 2 * kFirstTiles * FirstStage::kElements) * sizeof(T);
  static constexpr int kSecondBytes = (Shape::kRows * Shape::kHiddenStride + 2 * SecondStage::kElements) * sizeof(T);
  // The second product's tiles take the place of the first's.
  static constexpr int kTileBytes = kFirstBytes > kSecondBytes ? kFirstBytes : kSecondBytes;
  static constexpr int kStatisticsBytes = Shape::kRows * sizeof(RowStatistics);
  static constexpr int kRowBytes = Shape::kRows * Shape::kColumnWarps * sizeof(float);

 public:
  static constexpr int kMostBlocks = Op::most_resident_blocks(Shape::kGroups);
  static constexpr int kResidentBlocks = Shape::kResidentBlocks < kMostBlocks ? Shape::kResidentBlocks : kMostBlocks;
  static constexpr int kSharedBytes = kTileBytes + kStatisticsBytes + kRowBytes + Shape::kThreads / 32 * sizeof(double);
  static_assert(kTileBytes % 16 == 0 && kStatisticsBytes % 16 == 0 && kRowBytes % 8 == 0, "parts are aligned");

  __device__ __forceinline__ explicit Sandwich(const Op& op) : op_(op), tiles_(reinterpret_cast<T*>(shared_memory())) {
    unsigned char* next = shared_memory() + kTileBytes;
    block_.row_statistics = reinterpret_cast<RowStatistics*>(next);
    block_.row_scratch = reinterpret_cast<float*>(next += kStatisticsBytes);
    block_.block_scratch = reinterpret_cast<double*>(next + kRowBytes);
  }

  __device__ __forceinline__ void run() {
    LongSums<T, Shape::kRowBlocks, Shape::kGroups> sums;
    first_product(sums);
    __syncthreads();
    const Tile<T> hidden{tiles_, Shape::kHiddenStride};
    const auto terms = op_.activate(sums.finish(), block_, hidden);
    double share = 0;
    if (op_.writes_rows()) second_product(terms, share);
    op_.end(block_, terms, share);
  }

 private:
  __device__ __forceinline__ T* left_tile(int chunk) const {
    return tiles_ + chunk % Shape::kStages * Shape::kLeftElements;
  }

  __device__ __forceinline__ T* first_tile(int chunk) const {
    return tiles_ + Shape::kStages * Shape::kLeftElements + chunk % 2 * kFirstTiles * FirstStage::kElements;
  }

  // Calls visit(local row, column in the chunk) for the vectors of eight that this thread copies.
  template <class Visit>
  __device__ __forceinline__ void for_each_left_vector(Visit visit) const {
    constexpr int kVectors = Shape::kRows * Shape::kChunk / 8;
#pragma unroll
    for (int i = 0; i < (kVectors + Shape::kThreads - 1) / Shape::kThreads; ++i) {
      const int vector = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      if (kVectors % Shape::kThreads != 0 && vector >= kVectors) break;
      visit(vector / (Shape::kChunk / 8), vector % (Shape::kChunk / 8) * 8);
    }
  }

  __device__ __forceinline__ void copy_left(int chunk) const {
    T* tile = left_tile(chunk);
    for_each_left_vector([&](int local_row, int chunk_column) {
      const int64_t row = block_.first_row() + local_row;
      const int column = chunk * Shape::kChunk + chunk_column;
      const bool valid = row < op_.R && column < op_.D;
      const T* source = valid ? op_.left + row * op_.left_stride + column : op_.left;
      T* target = tile + local_row * Shape::kLeftStride + chunk_column;
#pragma unroll
      for (int i = 0; i < 8; i += 16 / sizeof(T)) copy_async(target + i, source + i, valid);
    });
  }

  // Each thread finishes what it copied itself, for which its own wait is enough.
  __device__ __forceinline__ void transform_left(int chunk) const {
    T* tile = left_tile(chunk);
    for_each_left_vector([&](int local_row, int chunk_column) {
      const int column = chunk * Shape::kChunk + chunk_column;
      if (block_.first_row() + local_row >= op_.R || column >= op_.D) return;
      T* vector = tile + local_row * Shape::kLeftStride + chunk_column;
      float values[8];
      unpack(load(vector), values);
      op_.transform(values, block_.row_statistics[local_row], column);
      store(vector, pack<T>(values));
    });
  }

  __device__ __forceinline__ void multiply_first(LongSums<T, Shape::kRowBlocks, Shape::kGroups>& sums, int chunk,
                                                 bool split, Groups groups) const {
    const Tile<const T> left{left_tile(chunk) + block_.first_of_warp() * Shape::kLeftStride, Shape::kLeftStride};
    const T* weights = first_tile(chunk);
    multiply<T, Op::kFirstOrder>(sums.sums, left, Tile<const T>{weights, FirstStage::kStride},
                                 split ? weights + FirstStage::kElements : nullptr, groups, Shape::kChunk);
    sums.end_of((chunk + 1) * Shape::kChunk);
  }

  __device__ __forceinline__ void first_product(LongSums<T, Shape::kRowBlocks, Shape::kGroups>& sums) const {
    const int chunks = (op_.D + Shape::kChunk - 1) / Shape::kChunk;
    const Groups groups = block_.groups(op_.inner);
    const bool split = Op::kSplits && op_.splits();
    FirstStage stage;
    const auto store_stage = [&](int chunk) {
      T* tile = first_tile(chunk);
      stage.store(op_.first, tile, split ? tile + FirstStage::kElements : nullptr);
    };
    for (int chunk = 0; chunk < Shape::kStages - 1; ++chunk) {
      if (chunk < chunks) copy_left(chunk);
      commit_copies();
    }
    op_.begin(block_);
    stage.load(op_.first, 0, 0);
    store_stage(0);
    sums.clear();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool more = chunk + 1 < chunks;
      if (more) stage.load(op_.first, (chunk + 1) * Shape::kChunk, 0);
      wait_for_copies<Shape::kStages - 2>();
      if constexpr (Op::kTransforms) {
        if (op_.transforms()) transform_left(chunk);
      }
      __syncthreads();
      // All have done with the chunk before this one: its place is free.
      if (chunk + Shape::kStages - 1 < chunks) copy_left(chunk + Shape::kStages - 1);
      commit_copies();
      multiply_first(sums, chunk, split, groups);
      if (more) store_stage(chunk + 1);
    }
    wait_for_copies<0>();
  }

  // Tiles of the second weights are visited by columns, and for each by depth.
  struct SecondTile {
    int depth = 0, column = 0;

    __device__ __forceinline__ SecondTile next(int inner) const {
      const int deeper = depth + Shape::kSecondDepth;
      return deeper < inner ? SecondTile{deeper, column} : SecondTile{0, column + Shape::kSecondColumns};
    }
  };

  template <class Terms>
  __device__ __forceinline__ void second_product(const Terms& terms, double& share) const {
    T* const weights = tiles_ + Shape::kRows * Shape::kHiddenStride;
    const T* hidden = tiles_ + block_.first_of_warp() * Shape::kHiddenStride;
    typename Op::Inputs inputs[Shape::kSecondGroups][kThreadRows];
    LongSums<T, Shape::kRowBlocks, Shape::kSecondGroups> sums;
    SecondStage stage;
    SecondTile tile;
    stage.load(op_.second, 0, 0);
    stage.store(op_.second, weights, nullptr);
    for (int i = 0; tile.column < op_.D; ++i) {
      const SecondTile next = tile.next(op_.inner);
      if (next.column < op_.D) stage.load(op_.second, next.depth, next.column);
      if (tile.depth == 0) {
        sums.clear();
        prefetch(inputs, tile.column);
      }
      __syncthreads();
      multiply_second(sums.sums, hidden + tile.depth, weights + i % 2 * SecondStage::kElements, op_.inner - tile.depth);
      sums.end_of(tile.depth + Shape::kSecondDepth);
      if (next.depth == 0) write(sums.finish(), inputs, tile.column, terms, share);
      if (next.column < op_.D) stage.store(op_.second, weights + (i + 1) % 2 * SecondStage::kElements, nullptr);
      tile = next;
    }
  }

  __device__ __forceinline__ void multiply_second(Sums<Shape::kRowBlocks, Shape::kSecondGroups>& sums, const T* hidden,
                                                  const T* weights, int inner) const {
    if (!op_.multiplies()) return;
    const Groups groups{block_.column_warp(), Shape::kColumnWarps, Shape::kSecondGroups};
    const int depth = min(Shape::kSecondDepth, (inner + Shape::kStep - 1) / Shape::kStep * Shape::kStep);
    multiply<T, Op::kSecondOrder>(sums, Tile<const T>{hidden, Shape::kHiddenStride},
                                  Tile<const T>{weights, SecondStage::kStride}, nullptr, groups, depth);
  }

  using InputsOfTile = typename Op::Inputs[Shape::kSecondGroups][kThreadRows];

  __device__ __forceinline__ void prefetch(InputsOfTile& inputs, int first_column) const {
#pragma unroll
    for (int group = 0; group < Shape::kSecondGroups; ++group) {
      const int column = first_column + block_.column(group);
#pragma unroll
      for (int line = 0; line < kThreadRows; ++line) {
        if (column < op_.D && block_.row(line) < op_.R) inputs[group][line] = op_.prefetch(block_.row(line), column);
      }
    }
  }

  template <class Terms>
  __device__ __forceinline__ void write(const Sums<Shape::kRowBlocks, Shape::kSecondGroups>& sums,
                                        const InputsOfTile& inputs, int first_column, const Terms& terms,
                                        double& share) const {
#pragma unroll
    for (int group = 0; group < Shape::kSecondGroups; ++group) {
      const int column = first_column + block_.column(group);
#pragma unroll
      for (int line = 0; line < kThreadRows; ++line) {
        if (column >= op_.D || block_.row(line) >= op_.R) continue;
        float values[8];
        sums.get(group, line, values);
        op_.write(block_.row(line), column, values, inputs[group][line], terms, line, share);
      }
    }
  }

  const Op& op_;
  T* tiles_;
  Block<Shape> block_;
};

template <class Shape, class Op>
__global__ void __launch_bounds__(Shape::kThreads, (Sandwich<Shape, Op>::kResidentBlocks))
    sandwich(const __grid_constant__ Op op) {
  Sandwich<Shape, Op>(op).run();
}

template <class Shape, class Op>
int launch_shape(Queue queue, const Op& op) {
  const dim3 blocks(static_cast<unsigned>(divide_up(op.R, Shape::kRows)));
  return launch(queue, {blocks, Shape::kThreads, Sandwich<Shape, Op>::kSharedBytes}, &sandwich<Shape, Op>, op);
}

// What every op has: left [R, D], and the weights of both products.
template <class Op>
void set_operands(Op& op, const ConstRows& left, const Weights& first, const Weights& second, int64_t R, int64_t D,
                  int64_t inner) {
  op.left = static_cast<const typename Op::Element*>(left.data);
  op.left_stride = left.stride;
  op.first = first;
  op.second = second;
  op.R = R;
  op.D = static_cast<int>(D);
  op.inner = static_cast<int>(inner);
}

// Runs an op in the smallest shape that holds its inner columns. A block of rows as large as the shape's is the unit of
// the grid, and of the partial results that end() leaves.
template <class Op>
int launch_sandwich(Queue queue, const Op& op) {
  using T = typename Op::Element;
  if (op.inner <= 64) return launch_shape<ShapeFor<T, 64>>(queue, op);
  if (op.inner <= 128) return launch_shape<ShapeFor<T, 128>>(queue, op);
  if (op.inner <= 256) return launch_shape<ShapeFor<T, 256>>(queue, op);
  return launch_shape<ShapeFor<T, 512>>(queue, op);
}

template <class T>
int64_t blocks_of_rows(int64_t R, int64_t inner) {
  const int rows = inner <= 64    ? ShapeFor<T, 64>::kRows
                   : inner <= 128 ? ShapeFor<T, 128>::kRows
                   : inner <= 256 ? ShapeFor<T, 256>::kRows
                                  : ShapeFor<T, 512>::kRows;
  return divide_up(R, rows);
}

}  // namespace petl::cuda
