// How a sandwich's operands lie in shared memory, and how its weights are packed for that.
#pragma once
#include "kernels/cuda/packing.h"
#include "kernels/cuda/shape.h"
#include "kernels/cuda/tile.h"

namespace petl::cuda {

template <class Shape, bool kRest>
class SandwichLayout {
  using T = typename Shape::Element;
  static constexpr int kElementBytes = sizeof(T);
  // Shared memory for the tiles of one block: a third of what a multiprocessor has where three blocks are to run, else
  // what every GPU lets a block have.
  static constexpr int kTileBudget = Shape::kResidentBlocks == 3 ? 75'000 : 98'304;
  static constexpr int kWideRow = 128 / kElementBytes, kNarrowRow = kWideRow / 2;

  static constexpr int stages_for(int stage_bytes, int other_bytes) {
    const int stages = (kTileBudget - other_bytes) / stage_bytes;
    return stages < 2 ? 2 : stages > 4 ? 4 : stages;
  }
  // Tiles are as deep as a wide row where that leaves room for so many stages.
  static constexpr int depth_for(int stages, int rows, int other_bytes) {
    return stages * 128 * rows + other_bytes <= kTileBudget ? kWideRow : kNarrowRow;
  }
  static constexpr int hidden_elements(int depth) { return (Shape::kInner + depth - 1) / depth * depth * Shape::kRows; }

 public:
  static constexpr int kFirstTiles = kRest ? 2 : 1;
  // left comes from memory, and needs to be asked for early; the second weights come from the second-level cache.
  static constexpr int kFirstDepth = depth_for(3, Shape::kRows + kFirstTiles * Shape::kInner, 0);
  using FirstTile = SharedTile<T, kFirstDepth>;
  static constexpr int kLeftElements = Shape::kRows * kFirstDepth, kFirstElements = Shape::kInner * kFirstDepth;
  static constexpr int kFirstStage = kLeftElements + kFirstTiles * kFirstElements;
  static constexpr int kFirstStages = stages_for(kFirstStage * kElementBytes, 0);

  static constexpr int kSecondDepth = depth_for(2, Shape::kSecondColumns, hidden_elements(kWideRow) * kElementBytes);
  using SecondTile = SharedTile<T, kSecondDepth>;
  // hidden: tiles [kRows, kSecondDepth], one after the other.
  static constexpr int kHiddenTile = Shape::kRows * kSecondDepth;
  static constexpr int kHiddenElements = hidden_elements(kSecondDepth);
  static constexpr int kSecondStage = Shape::kSecondColumns * kSecondDepth;
  static constexpr int kSecondStages = stages_for(kSecondStage * kElementBytes, kHiddenElements* kElementBytes);

 private:
  static constexpr int kFirstBytes = kFirstStages * kFirstStage * kElementBytes;
  static constexpr int kSecondBytes = (kHiddenElements + kSecondStages * kSecondStage) * kElementBytes;
  // The second product's tiles take the place of the first's.
  static constexpr int kTileBytes = kFirstBytes > kSecondBytes ? kFirstBytes : kSecondBytes;
  static constexpr int kStatisticsBytes = Shape::kRows * sizeof(RowStatistics);
  static constexpr int kRowBytes = Shape::kRows * Shape::kColumnWarps * sizeof(float);
  static_assert(kTileBytes % 16 == 0 && kStatisticsBytes % 16 == 0 && kRowBytes % 8 == 0, "parts are aligned");

 public:
  static constexpr int kBytes = kTileBytes + kStatisticsBytes + kRowBytes + Shape::kThreads / 32 * sizeof(double);

  __device__ __forceinline__ static Block<Shape> block(unsigned char* memory, int64_t R) {
    Block<Shape> block;
    const int64_t rows = R - block.first_row();
    block.rows = rows < Shape::kRows ? static_cast<int>(rows) : Shape::kRows;
    block.row_statistics = reinterpret_cast<RowStatistics*>(memory += kTileBytes);
    block.row_scratch = reinterpret_cast<float*>(memory += kStatisticsBytes);
    block.block_scratch = reinterpret_cast<double*>(memory + kRowBytes);
    return block;
  }
};

// The hidden units of a block's rows, in shared memory.
template <class Layout>
struct HiddenTile {
  using Tile = typename Layout::SecondTile;
  using T = typename Tile::Element;
  T* data;

  // Eight columns, from a multiple of eight on.
  __device__ __forceinline__ void store(int row, int column, const Packed<T>& packed) const {
    T* const tile = data + column / Tile::kColumns * Layout::kHiddenTile;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      const int vector = column % Tile::kColumns / Tile::kVector + i;
      *reinterpret_cast<uint4*>(tile + Tile::offset(row, vector)) = packed.words[i];
    }
  }
};

// Weights that are packed once serve every number of rows.
template <class T, bool kRest>
constexpr bool kPackAlike = [] {
  using Few = ShapeFor<T, 64>;
  using Many = WideShape<T>;
  return SandwichLayout<Few, kRest>::kFirstDepth == SandwichLayout<Many, kRest>::kFirstDepth &&
         SandwichLayout<Few, kRest>::kSecondDepth == SandwichLayout<Many, kRest>::kSecondDepth &&
         Few::kSecondColumns == Many::kSecondColumns;
}();
static_assert(kPackAlike<Bfloat16, false> && kPackAlike<Bfloat16, true>, "of both shapes of up to 64 inner columns");

// The weights of both products, packed for a sandwich of this layout.
template <class Layout>
PackedOperand first_operand(const Weights& source, Order order, int64_t D, int64_t inner) {
  PackedOperand operand = {};
  operand.source = source;
  operand.order = order;
  operand.rest = Layout::kFirstTiles == 2;
  operand.unit_depth = Layout::kFirstDepth;
  operand.cut = {static_cast<int>(divide_up(inner, kUnitColumns)), static_cast<int>(divide_up(D, Layout::kFirstDepth)),
                 1};
  return operand;
}

template <class Layout, class Shape>
PackedOperand second_operand(const Weights& source, Order order, int64_t D, int64_t inner) {
  PackedOperand operand = {};
  operand.source = source;
  operand.order = order;
  operand.unit_depth = Layout::kSecondDepth;
  operand.cut = {Shape::kSecondColumns / kUnitColumns, static_cast<int>(divide_up(inner, Layout::kSecondDepth)),
                 static_cast<int>(divide_up(D, Shape::kSecondColumns))};
  return operand;
}

}  // namespace petl::cuda
