// The tokens' products with the heads' rows, and what becomes of a thread's share of them.
#pragma once
#include "kernels/cuda/attention_pool_place.h"
#include "kernels/cuda/attention_pool_products.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/ring.h"

namespace petl::cuda {

// Of a block of tokens, which one warp cares for, one thread's products with heads g and g + 8 (for lane 4 g + t):
// of each the tokens 8 block + 2 t + i of the warp's sixteen are parts[block][2 * half + i].
struct PoolScores {
  float parts[2][4];

  // Calls visit(half, block, i, score).
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) visit(i / 2 % 2, i / 4, i % 2, parts[i / 4][i % 4]);
  }
};

__device__ __forceinline__ int pool_head(int half) { return pool_lane() / 4 + 8 * half; }
__device__ __forceinline__ int pool_token(int block, int i) {
  return kTokenBlock * pool_warp() + 8 * block + pool_lane() % 4 * 2 + i;
}

// Each warp has its share of depth of all products; warp w gets of those with block w the others' shares. They are
// added in an order that is the same for every block. The letters take the place of the heads' tiles.
template <class Memory, int kOperands, int kBlocks>
__device__ __forceinline__ void exchange_shares(const float (&shares)[kOperands][2 * kBlocks][4],
                                                PoolScores (&own)[kOperands]) {
  static_assert(Memory::kPlaces >= kPoolWarps - 1, "a place holds the letters of one sender to each");
  const auto letter = [](int operand, int block, int sender, int half) -> float4& {
    float4* const first = reinterpret_cast<float4*>(Memory::heads(sender - 1, 0));
    return first[((operand * kBlocks + block) * 2 + half) * 32 + pool_lane()];
  };
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOperands * kBlocks; ++i) {
    const int operand = i / kBlocks, block = i % kBlocks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&parts)[4] = shares[operand][2 * block + half];
      if (block == pool_warp()) {
        for (int j = 0; j < 4; ++j) own[operand].parts[half][j] = parts[j];
      } else {
        letter(operand, block, pool_warp() ^ block, half) = {parts[0], parts[1], parts[2], parts[3]};
      }
    }
  }
  __syncthreads();
  if (pool_warp() >= kBlocks) return;
#pragma unroll
  for (int i = 0; i < 2 * kOperands; ++i) {
    float (&parts)[4] = own[i / 2].parts[i % 2];
    const float4 others[3] = {letter(i / 2, pool_warp(), 1, i % 2), letter(i / 2, pool_warp(), 2, i % 2),
                              letter(i / 2, pool_warp(), 3, i % 2)};
#pragma unroll
    for (int j = 0; j < 4; ++j) parts[j] = (parts[j] + at(others[0], j)) + (at(others[1], j) + at(others[2], j));
  }
}

// own[i] = heads_i tokens^T; meanwhile() is called when the first copies are under way. Afterwards the last tiles of
// tokens are still in shared memory, and the rows' pointers have moved on by Memory::kPlaces tiles for each round.
template <class Memory, int kOperands, int kBlocks, class T, class Meanwhile>
__device__ __forceinline__ void find_scores(PoolRows<T, kBlocks>& tokens, PoolRows<T, 1> (&heads)[kOperands], int D,
                                            PoolScores (&own)[kOperands], Meanwhile meanwhile) {
  using Tile = PoolTile<T>;
  const PoolProducts<T> products;
  float shares[kOperands][2 * kBlocks][4] = {};
  const int whole = D / Tile::kColumns, rest = D % Tile::kColumns;
  const auto copy = [&](int first, int ahead) {
    const int column = ahead * Tile::kColumns, place = ahead % Memory::kPlaces;
    if (first + ahead < whole) {
      tokens.copy(Memory::tokens(place), column);
#pragma unroll
      for (int i = 0; i < kOperands; ++i) heads[i].copy(Memory::heads(place, i), column);
    } else if (first + ahead == whole && rest > 0) {
      tokens.copy_part(Memory::tokens(place), column, rest);
#pragma unroll
      for (int i = 0; i < kOperands; ++i) heads[i].copy_part(Memory::heads(place, i), column, rest);
    }
    if (ahead == Memory::kPlaces - 2) meanwhile();
  };
  const auto use = [&](int, int place) {
    products.template add_scores<kOperands, kBlocks>(shares, Memory::heads(place, 0), Memory::tokens(place));
  };
  stream_rounds<Memory::kPlaces>(whole + (rest > 0), copy, use, [&] {
    tokens.move(Memory::kPlaces * Tile::kColumns);
#pragma unroll
    for (int i = 0; i < kOperands; ++i) heads[i].move(Memory::kPlaces * Tile::kColumns);
  });
  exchange_shares<Memory, kOperands, kBlocks>(shares, own);
}

// Which of the thread's tokens take part: [block][i].
template <int kBlocks, class T>
__device__ __forceinline__ void find_present(const PoolPlace<T>& place, bool (&present)[2][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    present[i / 2][i % 2] = pool_warp() < kBlocks && place.takes_part(pool_token(i / 2, i % 2));
  }
}

// Combines the values of all tokens, for heads g and g + 8 of lane 4 g + t; every thread gets the results of its heads.
// `scratch` [kPoolWarps, kHeadGroup] is read until the next barrier.
template <class Combine>
__device__ __forceinline__ void reduce_pool_tokens(float (&values)[2], float* scratch, Combine combine) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    values[half] = reduce_quad(values[half], combine);
    if (pool_lane() % 4 == 0) scratch[pool_warp() * kHeadGroup + pool_head(half)] = values[half];
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* of_warp = scratch + pool_head(half);
    values[half] =
        combine(combine(of_warp[0], of_warp[kHeadGroup]), combine(of_warp[2 * kHeadGroup], of_warp[3 * kHeadGroup]));
  }
}
static_assert(kPoolWarps == 4, "so many values are combined");

template <class T>
__device__ __forceinline__ void store_pair(T* to, const float (&pair)[2]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack_pair(pair[0], pair[1], T{});
  } else {
    *reinterpret_cast<float2*>(to) = {pair[0], pair[1]};
  }
}

// values[half][block][i] of a thread, as PoolScores has them, to a weight tile.
template <class T>
__device__ __forceinline__ void store_weights(T* tile, const float (&values)[2][2][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_pair(tile + PoolWeightTile<T>::at(pool_head(i / 2), pool_token(i % 2, 0)), values[i / 2][i % 2]);
  }
}

}  // namespace petl::cuda
