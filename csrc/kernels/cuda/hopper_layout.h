// Weights as the Hopper path copies and multiplies them.
#pragma once
#include <cstdint>
#include <utility>

#include "kernels/cuda/hopper_ptx.h"

namespace petl::cuda {

constexpr int kHopperChunk = 64;  // columns of D that are copied at once: rows of 128 bytes

// Blocks of threads by their inner columns, P or B in whole numbers of wgmma's: those of a cluster share the weights
// that they copy, which pays where these are more than the rows.
struct HopperShape {
  int inner, cluster;
};
inline constexpr HopperShape kHopperShapes[] = {{64, 1}, {96, 2}, {128, 2}, {192, 2}, {208, 2}, {256, 2}};
constexpr int kHopperShapeCount = sizeof kHopperShapes / sizeof kHopperShapes[0];

// Of the narrowest shape that holds so many inner columns; there is one up to kHopperMaxInner.
constexpr int hopper_inner(int64_t inner) {
  for (const HopperShape& shape : kHopperShapes) {
    if (inner <= shape.inner) return shape.inner;
  }
  return 0;
}

// The fewest inner columns for which a shape is the narrowest.
__host__ __device__ constexpr int hopper_least_inner(int shape_inner) {
  int least = 1;
  for (const HopperShape& shape : kHopperShapes) {
    if (shape.inner < shape_inner) least = shape.inner + 1;
  }
  return least;
}

// The packed weights are tiles of inner * kHopperChunk elements: the first weights' chunks [inner, kHopperChunk];
// behind them those of what rounding left out of them, if it is wanted, or of a second first product; and the second
// ones' chunks, transposed: [kHopperChunk, inner], in pieces of 64, 32 and 16 inner columns. All are swizzled
// (hopper_ptx.h), so that a copy of the bytes is a tile to multiply. Inner columns beyond P or B are zeros.
constexpr int64_t hopper_packed_elements(int64_t D, int64_t inner, int passes) {
  return int64_t{hopper_inner(inner)} * D * (passes + 1);
}

// The prompt, or the hidden unit, of an inner column. They are dealt out as both products see them: in 32 inner columns
// (or the last 16), of which a lane's sums are 2 in every 8, those of one lane are neighbors.
__host__ __device__ constexpr int unit_of(int inner, int column) {
  const int first = column / 32 * 32, block = column % 32 / 8, lane = column % 8 / 2;
  return first + lane * (inner - first < 32 ? 4 : 8) + block * 2 + column % 2;
}

// Of a block of 8 inner columns, the unit of the lane's first one. From the first of four blocks on (or the first of
// the last two) they are neighbors: as many as there are columns of the lane in them.
template <int kInner>
__device__ __forceinline__ int unit_of_lane(int block) {
  return unit_of(kInner, block * 8) + static_cast<int>(threadIdx.x) % 4 * (kInner - block / 4 * 32 < 32 ? 4 : 8);
}

// How many neighbors those are.
template <int kInner>
__host__ __device__ constexpr int neighbors_from(int block) {
  return kInner / 8 - block < 4 ? 2 * (kInner / 8 - block) : 8;
}

struct Piece {
  int first, width;  // inner columns; it begins at element first * kHopperChunk of the tile
};

// The piece with an inner column.
__host__ __device__ constexpr Piece piece_with(int inner, int column) {
  const int whole = inner / 64 * 64, half = inner / 32 * 32;
  if (column < whole) return {column / 64 * 64, 64};
  return column < half ? Piece{whole, 32} : Piece{half, 16};
}

// Swizzling, or undoing it, for an element of a tile with so many columns.
__host__ __device__ constexpr int swizzled_element(int element, int columns) {
  return static_cast<int>(swizzled(static_cast<uint32_t>(element) * 2, static_cast<uint32_t>(columns) * 2) / 2);
}

}  // namespace petl::cuda
