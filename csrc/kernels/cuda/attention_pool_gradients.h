// The tokens' gradients, from the heads' weights and the scores' gradients.
#pragma once
#include <type_traits>

#include "kernels/cuda/attention_pool_place.h"
#include "kernels/cuda/attention_pool_products.h"
#include "kernels/cuda/ring.h"

namespace petl::cuda {

// What a thread writes of the tokens' gradients: of every eighth row, and of each tile's columns a word or, of float32,
// two.
template <class T, int kBlocks>
class PoolGradientRows {
  using Tile = PoolTile<T>;
  using Word = std::conditional_t<sizeof(T) == 2, uint4, float2>;
  static constexpr int kColumnBlocks = PoolProducts<T>::kColumnBlocks, kWordColumns = sizeof(Word) / sizeof(T);
  static constexpr int kTileWords = Tile::kColumns / kWordColumns;

 public:
  using Sums = float[kBlocks][kColumnBlocks][4];

  // Of `tokens` rows that begin at `first`.
  __device__ __forceinline__ PoolGradientRows(T* first, int tokens, int D)
      : first_column_(8 * kColumnBlocks * pool_warp() + pool_lane() % 4 * kWordColumns), tokens_(tokens), D_(D) {
    const int64_t row_words = D / kWordColumns;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      rows_[i] = reinterpret_cast<Word*>(first) + row(i) * row_words + first_column_ / kWordColumns;
    }
  }

  // A warp's sums of the tile that is `ahead` tiles behind the one to which move() has led, and begins at column
  // `tile_column`.
  __device__ __forceinline__ void write(const Sums& sums, int ahead, int tile_column) const {
#pragma unroll
    for (int word = 0; word < kColumnBlocks * 8 / kWordColumns / 4; ++word) {
      const int column = tile_column + first_column_ + 8 * word;
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const Word value = word_of(sums[i / 2], i % 2, word);
        if (row(i) < tokens_ && column < D_) rows_[i][ahead * kTileWords + 8 * word / kWordColumns] = value;
      }
    }
  }

  __device__ __forceinline__ void move(int tiles) {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) rows_[i] += tiles * kTileWords;
  }

 private:
  __device__ __forceinline__ static int row(int i) { return pool_lane() / 4 + 8 * i; }

  // The thread's sums are of neighboring columns: of 16-bit tiles they lie as slot_of says.
  __device__ __forceinline__ static Word word_of(const float (&sums)[kColumnBlocks][4], int half, int word) {
    if constexpr (sizeof(T) == 2) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = sums[i / 2][2 * half + i % 2];
      return pack<T>(values).words[0];
    } else {
      return {sums[word][2 * half], sums[word][2 * half + 1]};
    }
  }

  // Words, not elements: of pointers to these the compiler does not know that they are aligned.
  Word* rows_[2 * kBlocks];
  int first_column_, tokens_, D_;
};

// rows [tokens, D] = sum over groups of weight_tile(group, 0)^T query + weight_tile(group, 1)^T dpooled, of which the
// operands [groups, 2, kHeadGroup, stride] are tiles' rows. With one group its weights stay in registers.
template <bool kOneGroup, class Memory, int kBlocks, class T, class WeightTile>
__device__ __forceinline__ void write_gradients(PoolGradientRows<T, kBlocks> rows, int D, const T* operands,
                                                int64_t stride, int groups, WeightTile weight_tile) {
  using Tile = PoolTile<T>;
  using Products = PoolProducts<T>;
  const int tiles = (D + Tile::kColumns - 1) / Tile::kColumns, count = kOneGroup ? tiles : tiles * groups;
  const Products products;
  const auto weights_of = [&](int group, int i) { return Products::template by_token<kBlocks>(weight_tile(group, i)); };
  const typename Products::template Weights<kBlocks> only[2] = {weights_of(0, 0), weights_of(0, 1)};
  PoolRows<T, 2> heads(operands, stride, {true, true});
  // Tiles are visited by columns, and for each by groups.
  const auto copy = [&](int first, int ahead) {
    if (first + ahead >= count) return;
    const int group = (first + ahead) % groups, column = (first + ahead) / groups * Tile::kColumns;
    heads.copy(Memory::tokens(ahead % Memory::kPlaces),
               kOneGroup ? ahead * Tile::kColumns : column + group * 2 * kHeadGroup * static_cast<int>(stride));
  };
  typename PoolGradientRows<T, kBlocks>::Sums sums;
  const auto use = [&](int first, int place) {
    const int tile = kOneGroup ? first + place : (first + place) / groups;
    const int group = kOneGroup ? 0 : (first + place) % groups;
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < kBlocks * Products::kColumnBlocks * 4; ++i) {
        sums[i / 4 / Products::kColumnBlocks][i / 4 % Products::kColumnBlocks][i % 4] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      products.template add_gradients<kBlocks>(sums, kOneGroup ? only[i] : weights_of(group, i),
                                               Memory::tokens(place) + i * kHeadGroup * Tile::kStride);
    }
    if (kOneGroup || group == groups - 1) rows.write(sums, kOneGroup ? place : tile, tile * Tile::kColumns);
    __syncwarp();
  };
  stream_rounds<Memory::kPlaces>(count, copy, use, [&] {
    if (!kOneGroup) return;
    heads.move(Memory::kPlaces * Tile::kColumns);
    rows.move(Memory::kPlaces);
  });
}

}  // namespace petl::cuda
