// The kernels of few_rows.h, for the ops of forward.
#pragma once
#include "kernels/cuda/few_rows.h"
#include "kernels/cuda/sandwich.h"

namespace petl::cuda {

template <class T>
struct FirstSlicesTask {
  const T* left;
  int64_t left_stride;
  const T* first;
  int64_t R;
  int D, inner;
  bool has_norm;
  FewRows few;
};

// A block's partial sums, of 32 rows, 64 inner columns and one slice.
template <class T, bool kRest, bool kNormalizes>
class FirstSlice {
  using Task = FirstSlicesTask<T>;
  using Work = Shape<T, 1, 1, 2, 2, 2>;
  using Tile = SharedTile<T, kFewDepth>;
  using LeftCopy = TileCopy<Tile, Work::kRows, Work::kThreads>;
  using RightCopy = TileCopy<Tile, Work::kInner, Work::kThreads>;
  using Product = ChunkProduct<T, Tile, Tile, 32 * Work::kColumnWarps>;

  struct Deviation : DeviationSums<Task, LeftCopy> {
    using DeviationSums<Task, LeftCopy>::DeviationSums;

    template <class Block>
    __device__ __forceinline__ void store(Deviations* slice, const Block& block) const {
#pragma unroll
      for (int copy = 0; copy < LeftCopy::kCopies; ++copy) {
        const Deviations row = this->deviations_of(copy);
        const int number = LeftCopy::row() + copy * LeftCopy::kRowStep;
        if (LeftCopy::vector() == 0 && number < block.rows) slice[block.first_row() + number] = row;
      }
    }
  };
  using Watch = std::conditional_t<kNormalizes, Deviation, NoWatch>;

  static constexpr int kBytes = sizeof(T), kStages = 4, kHalf = kFewDepth / 2;
  static constexpr int kLeftElements = Work::kRows * kFewDepth, kRightElements = Work::kInner * kFewDepth;
  static constexpr int kStage = kLeftElements + (kRest ? 2 : 1) * kRightElements;

 public:
  static constexpr int kThreads = Work::kThreads, kRows = Work::kRows, kColumns = Work::kInner;
  static constexpr int kResidentBlocks = Work::kResidentBlocks;
  static constexpr int kSharedBytes = kStages * kStage * kBytes;

  __device__ __forceinline__ explicit FirstSlice(const Task& task)
      : task_(task),
        tiles_(reinterpret_cast<T*>(shared_memory())),
        slice_(static_cast<int>(blockIdx.y)),
        begin_(slice_ * task.few.chunks * kFewDepth),
        inner_(static_cast<int>(blockIdx.z) * kColumns),
        slots_((task.inner + 31) / 32 * 32) {
    block_.rows = static_cast<int>(min(task.R - block_.first_row(), int64_t{kRows}));
  }

  __device__ __forceinline__ void run() {
    Sums<1, 1> sums;
    Watch watch(task_, block_);
    multiply(sums, watch);
    if constexpr (kNormalizes) {
      if (task_.has_norm && inner_ == 0) watch.store(task_.few.deviations + slice_ * task_.R, block_);
    }
    if (block_.groups(slots_ - inner_).count == 0) return;
    float* const target = task_.few.partials + (slice_ * task_.R + block_.row(0)) * slots_ + inner_ + block_.column(0);
#pragma unroll
    for (int line = 0; line < block_.kThreadRows; ++line) {
      float values[8];
      sums.get(0, line, values);
      store_if(block_.has(line), target + line * 8 * slots_, pack<float>(values));
    }
  }

 private:
  // Rows beyond the last are copies of it: nothing of theirs is stored.
  __device__ __forceinline__ void find_left(const T* (&left)[LeftCopy::kCopies]) const {
#pragma unroll
    for (int copy = 0; copy < LeftCopy::kCopies; ++copy) {
      const int64_t row = min(block_.first_row() + LeftCopy::row() + copy * LeftCopy::kRowStep, task_.R - 1);
      left[copy] = task_.left + row * task_.left_stride + begin_ + LeftCopy::column();
    }
  }

  // A chunk's weights are one or two packed tiles beside each other, since these may be half as deep.
  __device__ __forceinline__ void multiply(Sums<1, 1>& sums, Watch& watch) const {
    const int unit = task_.few.first_depth, rest = slots_ * unit, tile = (kRest ? 2 : 1) * rest;
    const bool halved = unit < kFewDepth;
    const int right_step = (halved ? 2 : 1) * tile;                // of a chunk
    const int skipped = halved ? RightCopy::column() / kHalf : 0;  // tiles of a chunk before the thread's
    const T* right = task_.first + slice_ * task_.few.chunks * right_step + skipped * tile +
                     (inner_ + RightCopy::row()) * unit + RightCopy::column() - skipped * kHalf;
    const T* left[LeftCopy::kCopies];
    find_left(left);
    int left_columns = task_.D - begin_ - LeftCopy::column(), right_columns = task_.D - begin_ - skipped * kHalf;
    const SharedAddress target = shared_address(tiles_);
    const auto copy = [&](int place) {
      const SharedAddress stage = target + place * kStage * kBytes;
      LeftCopy::template for_each<Work::kRows>(Work::kRows, [&](int i, int) {
        copy_async(stage + (LeftCopy::offset() + i * LeftCopy::kSharedStep) * kBytes, left[i], left_columns > 0);
        left[i] += kFewDepth;
      });
      RightCopy::template for_each<32>(slots_ - inner_, [&](int i, int) {
        const SharedAddress weights =
            stage + (kLeftElements + RightCopy::offset() + i * RightCopy::kSharedStep) * kBytes;
        const T* const source = right + i * RightCopy::kRowStep * unit;
        copy_async(weights, source, right_columns > 0);
        if constexpr (kRest) copy_async(weights + kRightElements * kBytes, source + rest, right_columns > 0);
      });
      right += right_step;
      left_columns -= kFewDepth;
      right_columns -= kFewDepth;
    };
    const int count = min(task_.few.chunks, (task_.D - begin_ + kFewDepth - 1) / kFewDepth);
    begin_chunks<kStages>(count, copy);
    const Product product(tiles_, block_.first_of_warp(), tiles_ + kLeftElements, 32 * block_.column_warp());
    const int groups = block_.groups(min(slots_ - inner_, kColumns)).count;
    int column = begin_ + LeftCopy::column();
    sums.clear();
    const auto arrived = [&](int place) {
      if (inner_ == 0 && watch.wants(column)) {
        LeftCopy::template for_each<Work::kRows>(Work::kRows, [&](int i, int) {
          watch.look(tiles_ + place * kStage + LeftCopy::offset() + i * LeftCopy::kSharedStep, i, column);
        });
      }
      column += kFewDepth;
    };
    run_chunks<kStages>(count, copy, arrived, [&](int place) {
      const int stage = place * kStage;
      product.template add<kRest>(sums, stage, stage, kRightElements, groups, Product::kSteps, false);
    });
  }

  const Task& task_;
  T* const tiles_;
  const int slice_, begin_, inner_, slots_;
  Block<Work> block_;
};

template <class Op>
struct FewOutputsTask {
  Op op;
  FewRows few;
};

// A block's part of the output, of 16 rows and 128 columns.
template <class Op>
class FewOutput {
  using T = typename Op::Element;
  using Task = FewOutputsTask<Op>;
  using Work = Shape<T, 1, 4, 1, 4, 2>;
  using Tile = SharedTile<T, kFewDepth>;
  using Copy = TileCopy<Tile, Work::kSecondColumns, Work::kThreads>;
  using Product = ChunkProduct<T, Tile, Tile, Work::kSecondColumns>;
  static constexpr bool kNormalizes = !std::is_same_v<typename Op::template Watch<Copy>, NoWatch>;
  static_assert(Work::kInner == kMaxInner && Work::kSecondGroups == 1, "one shape serves all");

  struct Layout {
    using SecondTile = Tile;
    static constexpr int kHiddenTile = Work::kRows * kFewDepth;
  };

  static constexpr int kBytes = sizeof(T), kStages = 5, kStage = Work::kSecondColumns * kFewDepth;
  static constexpr int kHiddenElements = Work::kRows * Work::kInner;
  static constexpr int kTileBytes = (kHiddenElements + kStages * kStage) * kBytes;
  static constexpr int kStatisticsBytes = Work::kRows * sizeof(RowStatistics);
  static constexpr int kRowBytes = Work::kRows * Work::kColumnWarps * sizeof(float);

 public:
  static constexpr int kThreads = Work::kThreads, kRows = Work::kRows, kColumns = Work::kSecondColumns;
  static constexpr int kResidentBlocks = Work::kResidentBlocks;
  static constexpr int kSharedBytes = kTileBytes + kStatisticsBytes + kRowBytes;

  __device__ __forceinline__ explicit FewOutput(const Task& task)
      : task_(task), op_(task.op), tiles_(reinterpret_cast<T*>(shared_memory())) {
    unsigned char* const memory = shared_memory() + kTileBytes;
    block_.rows = static_cast<int>(min(op_.R - block_.first_row(), int64_t{kRows}));
    block_.row_statistics = reinterpret_cast<RowStatistics*>(memory);
    block_.row_scratch = reinterpret_cast<float*>(memory + kStatisticsBytes);
    block_.block_scratch = nullptr;
  }

  __device__ __forceinline__ void run() const {
    const int begin = static_cast<int>(blockIdx.y) * kColumns, column = begin + block_.column(0);
    const int steps = (op_.inner + Product::kStep - 1) / Product::kStep;
    const int depths = (steps + Product::kSteps - 1) / Product::kSteps;
    auto copy = copy_of_second(begin, steps);
    begin_chunks<kStages>(depths, copy);
    typename Op::Rows rows(op_, block_.row(0), column);
    typename Op::Inputs inputs[block_.kThreadRows];
#pragma unroll
    for (int line = 0; line < block_.kThreadRows; ++line) {
      inputs[line] = op_.prefetch((column < op_.D) & block_.has(line), rows, line, 0);
    }
    const auto terms = activate(begin == 0);
    const Product product(tiles_, 0, tiles_ + kHiddenElements, 32 * block_.column_warp());
    Sums<1, 1> sums;
    int depth = 0;
    sums.clear();
    run_chunks<kStages>(
        depths, copy, [](int) {},
        [&](int place) {
          product.template add<false>(sums, depth * Layout::kHiddenTile, place * kStage, 0, 1,
                                      steps - depth * Product::kSteps, false);
          ++depth;
        });
    const typename Op::Columns columns(op_, column < op_.D ? column : 0);
    float share = 0;
#pragma unroll
    for (int line = 0; line < block_.kThreadRows; ++line) {
      float values[8];
      sums.get(0, line, values);
      op_.write((column < op_.D) & block_.has(line), rows, line, 0, values, inputs[line], columns, terms, share);
    }
  }

 private:
  // Packed tiles of 128 columns, or two of 64, of the last tile along the depth only what is multiplied.
  __device__ __forceinline__ auto copy_of_second(int begin, int steps) const {
    const int half = kColumns / 2, packed = task_.few.second_columns, width = op_.D;
    const int tile = packed * kFewDepth, half_step = packed == half ? task_.few.second_depths * tile : half * kFewDepth;
    const bool has_half = begin + half < width;
    const T* second = op_.second + int64_t{begin} * kFewDepth * task_.few.second_depths +
                      static_cast<int>(threadIdx.x) * Tile::kVector;
    int depths = steps * Product::kStep - Copy::column();
    const SharedAddress target = shared_address(tiles_ + kHiddenElements + Copy::offset());
    return [=](int place) mutable {
      if (depths > 0) {
#pragma unroll
        for (int i = 0; i < Copy::kCopies; ++i) {
          const int in_half = i % (Copy::kCopies / 2), is_second = i / (Copy::kCopies / 2);
          copy_async(target + (place * kStage + i * Copy::kSharedStep) * kBytes,
                     second + is_second * half_step + in_half * kThreads * Tile::kVector, !is_second | has_half);
        }
      }
      second += tile;
      depths -= kFewDepth;
    };
  }

  // Only the blocks of the first columns keep what is kept of the rows.
  __device__ __forceinline__ auto activate(bool keeps) const {
    if constexpr (kNormalizes) find_statistics();
    Sums<1, Work::kGroups> sums;
    add_slices(sums);
    Block<Work> block = block_;
    if (!keeps) block.rows = 0;
    double share = 0;
    return op_.activate(sums, block, HiddenTile<Layout>{tiles_}, share);
  }

  __device__ __forceinline__ void find_statistics() const {
    if (const int number = static_cast<int>(threadIdx.x); number < kRows) {
      const int64_t row = min(block_.first_row() + number, op_.R - 1);
      Deviations all = {0, 0};
      for (int slice = 0; op_.has_norm && slice < task_.few.slices; ++slice) {
        const Deviations part = task_.few.deviations[slice * op_.R + row];
        all.sum += part.sum;
        all.square += part.square;
      }
      const float first = to_float(op_.left[row * op_.left_stride]);
      block_.row_statistics[number] =
          op_.has_norm ? statistics_of(first, all, op_.D, op_.epsilon) : RowStatistics{0, 0, 1};
    }
    __syncthreads();
  }

  // The loads of a few slices are under way together.
  __device__ __forceinline__ void add_slices(Sums<1, Work::kGroups>& sums) const {
    constexpr int kTogether = 4, kLines = Block<Work>::kThreadRows;
    const int slots = (op_.inner + 31) / 32 * 32;
    const int64_t slice_step = op_.R * slots;
    block_.for_each_group(op_.inner, [&](int group, int column) {
      const float* part = task_.few.partials + block_.row(0) * slots + column;
      float values[kLines][8] = {};
      for (int first = 0; first < task_.few.slices; first += kTogether) {
        Packed<float> parts[kTogether][kLines];
#pragma unroll
        for (int i = 0; i < kTogether * kLines; ++i) {
          const int slice = i / kLines, line = i % kLines;
          parts[slice][line] = load_if((first + slice < task_.few.slices) & block_.has(line),
                                       part + slice * slice_step + line * 8 * slots);
        }
#pragma unroll
        for (int i = 0; i < kTogether * kLines; ++i) {
          float added[8];
          unpack(parts[i / kLines][i % kLines], added);
#pragma unroll
          for (int j = 0; j < 8; ++j) values[i % kLines][j] += added[j];
        }
        part += kTogether * slice_step;
      }
#pragma unroll
      for (int line = 0; line < kLines; ++line) sums.set(group, line, values[line]);
    });
  }

  const Task& task_;
  const Op& op_;
  T* const tiles_;
  Block<Work> block_;
};

template <class T, bool kRest, bool kNormalizes>
__global__ void __launch_bounds__(FirstSlice<T, kRest, kNormalizes>::kThreads,
                                  (FirstSlice<T, kRest, kNormalizes>::kResidentBlocks))
    first_slices(const __grid_constant__ FirstSlicesTask<T> task) {
  FirstSlice<T, kRest, kNormalizes>(task).run();
}

template <class Op>
__global__ void __launch_bounds__(FewOutput<Op>::kThreads, FewOutput<Op>::kResidentBlocks)
    few_outputs(const __grid_constant__ FewOutputsTask<Op> task) {
  FewOutput<Op>(task).run();
}

template <bool kRest, bool kNormalizes, class Op>
int queue_first_slices(Queue queue, const Op& op, bool has_norm, const FewRows& few) {
  using T = typename Op::Element;
  using First = FirstSlice<T, kRest, kNormalizes>;
  const dim3 blocks(static_cast<unsigned>(divide_up(op.R, First::kRows)), few.slices,
                    static_cast<unsigned>(divide_up(op.inner, First::kColumns)));
  const FirstSlicesTask<T> task{op.left, op.left_stride, op.first, op.R, op.D, op.inner, has_norm, few};
  return launch(queue, {blocks, First::kThreads, First::kSharedBytes}, &first_slices<T, kRest, kNormalizes>, task);
}

template <class Op>
int queue_few_outputs(Queue queue, const Op& op, const FewRows& few) {
  using Output = FewOutput<Op>;
  const dim3 blocks(static_cast<unsigned>(divide_up(op.R, Output::kRows)),
                    static_cast<unsigned>(divide_up(op.D, Output::kColumns)));
  return launch(queue, {blocks, Output::kThreads, Output::kSharedBytes}, &few_outputs<Op>, FewOutputsTask<Op>{op, few});
}

}  // namespace petl::cuda
