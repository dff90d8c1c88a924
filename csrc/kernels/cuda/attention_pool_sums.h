// The tokens' sums by the heads' weights.
#pragma once
#include "kernels/cuda/attention_pool_place.h"
#include "kernels/cuda/attention_pool_products.h"
#include "kernels/cuda/ring.h"

namespace petl::cuda {

// Where a thread's pairs of sums go, in rows [heads, stride]: heads g and g + 8 of lane 4 g + t, and its columns of
// every tile.
template <class T, class Out>
struct PoolSumRows {
  Out* to;  // of the first tile and head g
  int64_t stride;

  __device__ __forceinline__ PoolSumRows(Out* rows, int64_t stride)
      : to(rows + pool_head(0) * stride + own_column()), stride(stride) {}

  __device__ __forceinline__ static int own_column() {
    return 8 * PoolProducts<T>::kColumnBlocks * pool_warp() + pool_lane() % 4 * 2;
  }
  __device__ __forceinline__ Out* at(int half, int column) const { return to + 8 * half * stride + column; }
  __device__ __forceinline__ void move(int columns) { to += columns; }
};

// One part's of several: they will be combined. The rows are whole tiles.
template <class T>
struct PoolPartSums : PoolSumRows<T, float> {
  using PoolSumRows<T, float>::PoolSumRows;

  __device__ __forceinline__ void store(int half, int column, float low, float high) const {
    *reinterpret_cast<float2*>(this->at(half, column)) = {low, high};
  }
};

// All of a sample's, for which there is but one part, times a factor of each head.
template <class T, class Out>
struct PoolAllSums : PoolSumRows<T, Out> {
  float factors[2];
  int width;

  __device__ __forceinline__ PoolAllSums(Out* rows, int D, float factor, float factor_of_second)
      : PoolSumRows<T, Out>(rows, D), factors{factor, factor_of_second}, width(D - this->own_column()) {}

  __device__ __forceinline__ void store(int half, int column, float low, float high) const {
    if (column < width) store_pair(this->at(half, column), factors[half] * low, factors[half] * high);
  }
  __device__ __forceinline__ void move(int columns) {
    PoolSumRows<T, Out>::move(columns);
    width -= columns;
  }
};

// rows [the group's heads, D] = weights tokens, tile by tile. Those that find_scores has left in shared memory come
// first and need no copies; others follow in their places. The tokens' rows are as find_scores has left them, too.
template <class Memory, int kBlocks, class T, class Rows>
__device__ __forceinline__ void sum_tokens(PoolRows<T, kBlocks>& tokens, const T* weight_tile, int D, int heads,
                                           Rows rows) {
  using Tile = PoolTile<T>;
  using Products = PoolProducts<T>;
  const int tiles = (D + Tile::kColumns - 1) / Tile::kColumns;
  // Of each place the last tile, then others, kPlaces apart. Those of place 0 are where the pointers begin.
  const int last = (tiles - 1) / Memory::kPlaces * Memory::kPlaces;
  const auto column_of = [&](int place) {
    return (place < tiles - last ? place : place - Memory::kPlaces) * Tile::kColumns;
  };
  const Products products;
  const auto weights = Products::template by_head<kBlocks>(weight_tile);
  const auto copy = [&](int first, int ahead) {
    const bool is_kept = first == 0 && ahead < Memory::kPlaces;
    if (is_kept || first + ahead >= tiles) return;
    const int place = ahead % Memory::kPlaces;
    tokens.copy(Memory::tokens(place), column_of(place) - ahead / Memory::kPlaces * Memory::kPlaces * Tile::kColumns);
  };
  const auto use = [&](int, int place) {
    float sums[Products::kColumnBlocks][4] = {};
    products.template add_sums<kBlocks>(sums, weights, Memory::tokens(place));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pool_head(half) >= heads) continue;
#pragma unroll
      for (int block = 0; block < Products::kColumnBlocks; ++block) {
        rows.store(half, column_of(place) + 8 * block, sums[block][2 * half], sums[block][2 * half + 1]);
      }
    }
  };
  tokens.move(-Memory::kPlaces * Tile::kColumns);
  rows.move(last * Tile::kColumns);
  stream_rounds<Memory::kPlaces>(tiles, copy, use, [&] {
    tokens.move(-Memory::kPlaces * Tile::kColumns);
    rows.move(-Memory::kPlaces * Tile::kColumns);
  });
}

}  // namespace petl::cuda
