// Two products with something between them, for a tile of rows, in one pass over the rows:
//
//     inner = left first            [rows, inner], summed over the width D in chunks
//     hidden = activate(inner)      in shared memory, rounded to the dtype of the products
//     outer = hidden second         [rows, D], in chunks of columns, which leave as they are summed
//
// Forward and backward of prompt diffusion and of the adapter are all of this kind. An Op says what is special:
//
//     Element                       float, Bfloat16 or Float16: of left, of hidden and of what is written
//     kRest                         whether the first product also sees what rounding its weights left out
//     most_resident_blocks(groups)  how many a multiprocessor can run at once without spilling registers
//     left, left_stride, R, D, inner, and first, second: the weights, packed for SandwichLayout
//     Watch<Copy>(op, block)        sees left on its way: if wants(column), look(vector, copy, column) at
//                                   what the thread copied; end(block),
//                                   share(), its part of what end() below gets
//     kWritesRows                   false: there is no second product, and end(sums, block) is all that follows
//     activate(sums, block, hidden, share) -> Terms
//                                   by all threads; Terms is what write() needs of the thread's rows
//     writes_rows(), multiplies()   whether anything is to be written for rows, and from the second product
//     Rows(op, row, column)         where the thread reads and writes rows: RowWalks, and advance(columns)
//     Columns(op, column)           what write() needs of eight columns
//     Inputs, prefetch(valid, rows, line, column), write(valid, rows, line, column, products, inputs, columns, terms,
//     share)                        of eight columns; where they are not valid, nothing is read or written
//     end(block, share)             by all threads; `share` is what Watch, activate() and write() have added up, of a
//     sum
//                               over all rows
#pragma once
#include "kernels/cuda/chunk_product.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packing.h"
#include "kernels/cuda/ring.h"
#include "kernels/cuda/sandwich_layout.h"

namespace petl::cuda {

// A matrix of rows as one thread walks over it: every eighth row, eight columns at a time.
template <class T>
struct RowWalk {
  T* first;
  int64_t step;  // elements between its rows

  __device__ __forceinline__ static RowWalk from(T* rows, int64_t stride, int64_t row, int column) {
    return {rows + row * stride + column, 8 * stride};
  }
  __device__ __forceinline__ T* at(int line, int column) const { return first + line * step + column; }
};

// What looks at nothing.
struct NoWatch {
  template <class Op, class Block>
  __device__ __forceinline__ NoWatch(const Op&, const Block&) {}
  __device__ __forceinline__ bool wants(int) const { return false; }
  template <class T>
  __device__ __forceinline__ void look(T*, int, int) {}
  template <class Block>
  __device__ __forceinline__ void end(const Block&) const {}
  __device__ __forceinline__ double share() const { return 0; }
};

template <class Shape, class Op>
class Sandwich {
  using T = typename Shape::Element;
  using Layout = SandwichLayout<Shape, Op::kRest>;
  using FirstTile = typename Layout::FirstTile;
  using SecondTile = typename Layout::SecondTile;
  using LeftCopy = TileCopy<FirstTile, Shape::kRows, Shape::kThreads>;
  using FirstCopy = TileCopy<FirstTile, Shape::kInner, Shape::kThreads>;
  using SecondCopy = TileCopy<SecondTile, Shape::kSecondColumns, Shape::kThreads>;
  using Watch = typename Op::template Watch<LeftCopy>;
  using FirstProduct = ChunkProduct<T, FirstTile, FirstTile, 32 * Shape::kColumnWarps>;
  using SecondProduct = ChunkProduct<T, SecondTile, SecondTile, 32 * Shape::kColumnWarps>;
  static constexpr int kThreadRows = Block<Shape>::kThreadRows, kBytes = sizeof(T);

 public:
  static constexpr int kMostBlocks = Op::most_resident_blocks(Shape::kGroups);
  static constexpr int kResidentBlocks = Shape::kResidentBlocks < kMostBlocks ? Shape::kResidentBlocks : kMostBlocks;
  static constexpr int kSharedBytes = Layout::kBytes;

  __device__ __forceinline__ explicit Sandwich(const Op& op)
      : op_(op), tiles_(reinterpret_cast<T*>(shared_memory())), block_(Layout::block(shared_memory(), op.R)) {}

  __device__ __forceinline__ void run() {
    LongSums<T, Shape::kRowBlocks, Shape::kGroups> sums;
    Watch watch(op_, block_);
    first_product(sums, watch);
    // All have done with the tiles, whose place the second product takes.
    __syncthreads();
    watch.end(block_);
    if constexpr (Op::kWritesRows) {
      double share = watch.share();
      const auto terms = op_.activate(sums.finish(), block_, HiddenTile<Layout>{tiles_}, share);
      if (op_.writes_rows()) second_product(terms, share);
      op_.end(block_, share);
    } else {
      op_.end(sums.finish(), block_);
    }
  }

 private:
  // Rows beyond the last are copies of it: nothing of theirs is stored.
  __device__ __forceinline__ void find_left(const T* (&left)[LeftCopy::kCopies]) const {
#pragma unroll
    for (int copy = 0; copy < LeftCopy::kCopies; ++copy) {
      const int64_t row = block_.first_row() + LeftCopy::row() + copy * LeftCopy::kRowStep;
      left[copy] = op_.left + (row < op_.R ? row : op_.R - 1) * op_.left_stride + LeftCopy::column();
    }
  }

  __device__ __forceinline__ void first_product(LongSums<T, Shape::kRowBlocks, Shape::kGroups>& sums,
                                                Watch& watch) const {
    constexpr int kVectorStep = Shape::kThreads * FirstTile::kVector;
    const int slots = (op_.inner + 31) / 32 * 32, rest = slots * FirstTile::kColumns;
    const int tile = Layout::kFirstTiles * rest;
    const T* left[LeftCopy::kCopies];
    find_left(left);
    const T* first = op_.first + threadIdx.x * FirstTile::kVector;
    int columns = op_.D - LeftCopy::column();
    SharedAddress target = shared_address(tiles_ + LeftCopy::offset());
    keep(target);
    const auto copy = [&](int place) {
      const SharedAddress stage = target + place * Layout::kFirstStage * kBytes;
      LeftCopy::template for_each<Shape::kRows>(Shape::kRows, [&](int i, int) {
        copy_async(stage + i * LeftCopy::kSharedStep * kBytes, left[i], columns > 0);
        left[i] += FirstTile::kColumns;
      });
      columns -= FirstTile::kColumns;
      FirstCopy::template for_each<Shape::kLeastInner>(slots, [&](int i, int) {
        const SharedAddress weights = stage + (Layout::kLeftElements + i * FirstCopy::kSharedStep) * kBytes;
        copy_async(weights, first + i * kVectorStep);
        if constexpr (Op::kRest) copy_async(weights + Layout::kFirstElements * kBytes, first + rest + i * kVectorStep);
      });
      first += tile;
    };
    const int chunks = (op_.D + FirstTile::kColumns - 1) / FirstTile::kColumns;
    begin_chunks<Layout::kFirstStages>(chunks, copy);
    const FirstProduct product(tiles_, block_.first_of_warp(), tiles_ + Layout::kLeftElements,
                               32 * block_.column_warp());
    const int groups = block_.groups(op_.inner).count;
    int depth = 0;
    sums.clear();
    const auto arrived = [&](int place) {
      if (!watch.wants(depth + LeftCopy::column())) return;
      T* const stage = tiles_ + place * Layout::kFirstStage + LeftCopy::offset();
      LeftCopy::template for_each<Shape::kRows>(Shape::kRows, [&](int i, int) {
        watch.look(stage + i * LeftCopy::kSharedStep, i, depth + LeftCopy::column());
      });
    };
    run_chunks<Layout::kFirstStages>(chunks, copy, arrived, [&](int place) {
      const int stage = place * Layout::kFirstStage;
      product.template add<Op::kRest>(sums.sums, stage, stage, Layout::kFirstElements, groups, FirstProduct::kSteps,
                                      false);
      depth += FirstTile::kColumns;
      sums.end_of(depth);
    });
  }

  // The second weights' tiles come by columns, and for each by depth.
  template <class Terms>
  __device__ __forceinline__ void second_product(const Terms& terms, double& share) const {
    constexpr int kVectorStep = Shape::kThreads * SecondTile::kVector;
    const int steps = (op_.inner + SecondProduct::kStep - 1) / SecondProduct::kStep;
    const int depths = (steps + SecondProduct::kSteps - 1) / SecondProduct::kSteps;
    const int count = depths * ((op_.D + Shape::kSecondColumns - 1) / Shape::kSecondColumns);
    T* const weights = tiles_ + Layout::kHiddenElements;
    const T* second = op_.second + threadIdx.x * SecondTile::kVector;
    // Of the last tile along the depth only what is multiplied.
    const int first_depth = steps * SecondProduct::kStep - SecondCopy::column();
    int copied = 0;
    SharedAddress target = shared_address(weights + SecondCopy::offset());
    keep(target);
    const auto copy = [&](int place) {
      const SharedAddress stage = target + place * Layout::kSecondStage * kBytes;
      if (copied * SecondTile::kColumns < first_depth) {
#pragma unroll
        for (int i = 0; i < SecondCopy::kCopies; ++i) {
          copy_async(stage + i * SecondCopy::kSharedStep * kBytes, second + i * kVectorStep);
        }
      }
      second += Layout::kSecondStage;
      copied = copied + 1 == depths ? 0 : copied + 1;
    };
    begin_chunks<Layout::kSecondStages>(count, copy);
    const SecondProduct product(tiles_, block_.first_of_warp(), weights, 32 * block_.column_warp());
    LongSums<T, Shape::kRowBlocks, Shape::kSecondGroups> sums;
    typename Op::Rows rows(op_, block_.row(0), block_.column(0));
    typename Op::Inputs inputs[Shape::kSecondGroups][kThreadRows];
    int depth = 0, column = block_.column(0);
    prefetch(inputs, rows, column);
    run_chunks<Layout::kSecondStages>(
        count, copy, [](int) {},
        [&](int place) {
          if (depth == 0) sums.begin();
          if (op_.multiplies()) {
            product.template add<false>(sums.sums, depth * Layout::kHiddenTile, place * Layout::kSecondStage, 0,
                                        Shape::kSecondGroups, steps - depth * SecondProduct::kSteps, depth == 0);
            sums.end_of((depth + 1) * SecondTile::kColumns);
          }
          if (++depth < depths) return;
          depth = 0;
          float tile_share = 0;
          write(sums.finish(), inputs, rows, column, terms, tile_share);
          share += tile_share;
          column += Shape::kSecondColumns;
          rows.advance(Shape::kSecondColumns);
          prefetch(inputs, rows, column);
        });
  }

  static constexpr int kGroupColumns = 32 * Shape::kColumnWarps;

  // An Op without a second product has no Inputs and no Rows.
  template <class Inputs, class Rows>
  __device__ __forceinline__ void prefetch(Inputs (&inputs)[Shape::kSecondGroups][kThreadRows], const Rows& rows,
                                           int column) const {
#pragma unroll
    for (int group = 0; group < Shape::kSecondGroups; ++group) {
#pragma unroll
      for (int line = 0; line < kThreadRows; ++line) {
        const bool valid = (column + group * kGroupColumns < op_.D) & block_.has(line);
        inputs[group][line] = op_.prefetch(valid, rows, line, group * kGroupColumns);
      }
    }
  }

  template <class Terms, class Inputs, class Rows>
  __device__ __forceinline__ void write(const Sums<Shape::kRowBlocks, Shape::kSecondGroups>& sums,
                                        const Inputs (&inputs)[Shape::kSecondGroups][kThreadRows], const Rows& rows,
                                        int column, const Terms& terms, float& share) const {
#pragma unroll
    for (int group = 0; group < Shape::kSecondGroups; ++group) {
      const bool inside = column + group * kGroupColumns < op_.D;
      const typename Op::Columns columns(op_, inside ? column + group * kGroupColumns : 0);
#pragma unroll
      for (int line = 0; line < kThreadRows; ++line) {
        float values[8];
        sums.get(group, line, values);
        op_.write(inside & block_.has(line), rows, line, group * kGroupColumns, values, inputs[group][line], columns,
                  terms, share);
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

// What every op has: left [R, D], and the packed weights of both products.
template <class Op>
void set_operands(Op& op, const ConstRows& left, const typename Op::Element* first, const typename Op::Element* second,
                  int64_t R, int64_t D, int64_t inner) {
  op.left = static_cast<const typename Op::Element*>(left.data);
  op.left_stride = left.stride;
  op.first = first;
  op.second = second;
  op.R = R;
  op.D = static_cast<int>(D);
  op.inner = static_cast<int>(inner);
}

// The blocks of a grid, each of which leaves one partial result.
template <class Shape>
int64_t blocks_of_rows(int64_t R) {
  return divide_up(R, Shape::kRows);
}

template <class Shape, class Op>
int launch_sandwich(Queue queue, const Op& op) {
  const dim3 blocks(static_cast<unsigned>(blocks_of_rows<Shape>(op.R)));
  return launch(queue, {blocks, Shape::kThreads, Sandwich<Shape, Op>::kSharedBytes}, &sandwich<Shape, Op>, op);
}

}  // namespace petl::cuda
