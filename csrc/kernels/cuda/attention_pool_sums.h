// The tokens' sums by the heads' weights.
#pragma once
#include "kernels/cuda/attention_pool_place.h"
#include "kernels/cuda/attention_pool_products.h"
#include "kernels/cuda/ring.h"

namespace petl::cuda {

// target [the group's heads, stride] = weights tokens, tile by tile. Those that find_scores has left in shared memory
// come first and need no copies; others follow in their places. The rows are as find_scores has left them, too.
template <class Memory, int kBlocks, class T>
__device__ __forceinline__ void sum_tokens(PoolRows<T, kBlocks>& tokens, const T* weight_tile, int D, int heads,
                                           float* target, int64_t stride) {
  using Tile = PoolTile<T>;
  using Products = PoolProducts<T>;
  const int tiles = (D + Tile::kColumns - 1) / Tile::kColumns;
  // Of each place the last tile, then others, Memory::kPlaces apart. Those of place 0 are where the pointers begin.
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
  tokens.move(-Memory::kPlaces * Tile::kColumns);
  float* to = target + pool_head(0) * stride + last * Tile::kColumns + 8 * Products::kColumnBlocks * pool_warp() +
              pool_lane() % 4 * 2;
  const auto use = [&](int, int place) {
    float sums[Products::kColumnBlocks][4] = {};
    products.template add_sums<kBlocks>(sums, weights, Memory::tokens(place));
    float* const tile = to + column_of(place);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pool_head(half) >= heads) continue;
#pragma unroll
      for (int block = 0; block < Products::kColumnBlocks; ++block) {
        *reinterpret_cast<float2*>(tile + 8 * half * stride + 8 * block) = {sums[block][2 * half],
                                                                            sums[block][2 * half + 1]};
      }
    }
    __syncwarp();
  };
  stream_rounds<Memory::kPlaces>(tiles, copy, use, [&] {
    tokens.move(-Memory::kPlaces * Tile::kColumns);
    to -= Memory::kPlaces * Tile::kColumns;
  });
}

}  // namespace petl::cuda
