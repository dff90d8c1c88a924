// Where the elements of a tile lie in shared memory.
#pragma once
#include "kernels/cuda/elements.h"

namespace petl::cuda {

// Rows of kColumns elements, without gaps. A row's vectors of 16 bytes are exchanged so that neither eight lanes that
// take one vector of eight rows, nor eight that take neighboring vectors, meet in a bank of memory.
template <class T, int kColumns_>
struct SharedTile {
  using Element = T;
  static constexpr int kColumns = kColumns_;
  static constexpr int kVector = 16 / sizeof(T);       // elements
  static constexpr int kVectors = kColumns / kVector;  // of a row
  static_assert(kColumns % kVector == 0 && (kVectors == 4 || kVectors % 8 == 0), "rows fill the banks evenly");

  // What is added, without carry, to the number of each vector of a row. It repeats after eight rows.
  __device__ __forceinline__ static int turn(int row) {
    if constexpr (kVectors == 4) return row / 2 % 4;
    // Of 16-bit elements four lanes write neighboring vectors of one row, four those of the next; of floats four write
    // every second vector.
    return sizeof(T) == 2 ? row % 2 * 4 + row / 2 % 4 : row % 8;
  }

  // The first element of a vector.
  __device__ __forceinline__ static int offset(int row, int vector) {
    return row * kColumns + (vector ^ turn(row)) * kVector;
  }
};

// How kThreads threads copy the rows of a tile: each copies vector vector() of rows row(), row() + kRowStep, ...
template <class Tile, int kRows, int kThreads>
struct TileCopy {
  static constexpr int kLanes = Tile::kVectors;  // neighboring threads that share a row
  static constexpr int kRowStep = kThreads / Tile::kVectors, kCopies = (kRows + kRowStep - 1) / kRowStep;
  // Elements between a thread's vectors in shared memory, and in memory where the rows lie back to back.
  static constexpr int kSharedStep = kRowStep * Tile::kColumns;
  static_assert(kThreads % Tile::kVectors == 0 && kRowStep % 8 == 0, "a thread's rows have their vectors in one order");

  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x) / Tile::kVectors; }
  __device__ __forceinline__ static int vector() { return static_cast<int>(threadIdx.x) % Tile::kVectors; }
  __device__ __forceinline__ static int column() { return vector() * Tile::kVector; }
  __device__ __forceinline__ static int offset() { return Tile::offset(row(), vector()); }

  // Calls visit(copy, row) for the thread's vectors of the first `rows` rows, of which there are at least kLeast.
  template <int kLeast, class Visit>
  __device__ __forceinline__ static void for_each(int rows, Visit visit) {
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      if ((copy + 1) * kRowStep <= kLeast || row() + copy * kRowStep < rows) visit(copy, row() + copy * kRowStep);
    }
  }
};

}  // namespace petl::cuda
