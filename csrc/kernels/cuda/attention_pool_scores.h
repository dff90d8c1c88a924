// The tokens' products with the heads' rows, and what becomes of a thread's share of them.
#pragma once
#include "kernels/cuda/attention_pool_place.h"
#include "kernels/cuda/attention_pool_products.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/ring.h"

namespace petl::cuda {

// Each warp has its share of depth of all products; that of a block of tokens it sends to the warp whose block it is.
// Shares are added in an order that is the same for every block. In a round each warp gets one block; the letters take
// the place of the heads' tiles.
template <class Memory, int kOperands, int kBlocks>
__device__ __forceinline__ void exchange_shares(const float (&shares)[kOperands][2 * kBlocks][4], int round,
                                                float (&own)[kOperands][2][kPoolSlots<kBlocks>]) {
  static_assert(Memory::kPlaces >= kPoolWarps - 1, "a place holds the letters of one sender to each");
  const auto letter = [](int operand, int receiver, int sender, int half) -> float4& {
    float4* const letters = reinterpret_cast<float4*>(Memory::heads(sender - 1, 0));
    return letters[((operand * kPoolWarps + receiver) * 2 + half) * 32 + pool_lane()];
  };
  float4 mine[kOperands][2];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * kOperands * kPoolWarps; ++i) {
    const int operand = i / 8, receiver = i / 2 % 4, half = i % 2;
    const int block = round * kPoolWarps + receiver;
    if (block >= kBlocks) continue;
    const float (&parts)[4] = shares[operand][2 * block + half];
    const float4 share = {parts[0], parts[1], parts[2], parts[3]};
    if (receiver == pool_warp()) {
      mine[operand][half] = share;
    } else {
      letter(operand, receiver, pool_warp() ^ receiver, half) = share;
    }
  }
  __syncthreads();
  if (round * kPoolWarps + pool_warp() >= kBlocks) return;
#pragma unroll
  for (int i = 0; i < 2 * kOperands; ++i) {
    const float4 others[3] = {letter(i / 2, pool_warp(), 1, i % 2), letter(i / 2, pool_warp(), 2, i % 2),
                              letter(i / 2, pool_warp(), 3, i % 2)};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      own[i / 2][j / 2][4 * round + i % 2 * 2 + j % 2] =
          (at(mine[i / 2][i % 2], j) + at(others[0], j)) + (at(others[1], j) + at(others[2], j));
    }
  }
}

// own[i] = heads_i tokens^T; meanwhile() is called when the first copies are under way. Afterwards the last tiles of
// tokens are still in shared memory, and the rows' pointers have moved on by Memory::kPlaces tiles for each round.
template <class Memory, int kOperands, int kBlocks, class T, class Meanwhile>
__device__ __forceinline__ void find_scores(PoolRows<T, kBlocks>& tokens, PoolRows<T, 1> (&heads)[kOperands], int D,
                                            float (&own)[kOperands][2][kPoolSlots<kBlocks>], Meanwhile meanwhile) {
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
#pragma unroll
  for (int round = 0; round * kPoolWarps < kBlocks; ++round) {
    exchange_shares<Memory, kOperands, kBlocks>(shares, round, own);
  }
}

// Which of the thread's tokens take part.
template <int kBlocks, class T>
__device__ __forceinline__ void find_present(const PoolPlace<T>& place, bool (&present)[kPoolSlots<kBlocks>]) {
  int tokens[kPoolSlots<kBlocks>];
#pragma unroll
  for (int slot = 0; slot < kPoolSlots<kBlocks>; ++slot) tokens[slot] = pool_token(slot);
  place.find_present(tokens, present);
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

// A thread's weights to their tile.
template <int kBlocks, class T>
__device__ __forceinline__ void store_weights(T* tile, const float (&values)[2][kPoolSlots<kBlocks>]) {
#pragma unroll
  for (int slot = 0; slot < kPoolSlots<kBlocks>; slot += 2) {
    if (pool_block(slot) >= kBlocks) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* const to = tile + PoolWeightTile<T, kBlocks>::at(pool_head(half), pool_token(slot));
      store_pair(to, values[half][slot], values[half][slot + 1]);
    }
  }
}

}  // namespace petl::cuda
