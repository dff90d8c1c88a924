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
// operands [groups, 2, kHeadGroup, stride] are tiles' rows.
template <class Memory, int kBlocks, class T, class WeightTile>
class PoolTokenGradients {
  using Tile = PoolTile<T>;
  using Products = PoolProducts<T>;
  using Weights = typename Products::template Weights<kBlocks>;
  using Rows = PoolGradientRows<T, kBlocks>;

 public:
  __device__ __forceinline__ PoolTokenGradients(const Rows& rows, int D, const T* operands, int64_t stride,
                                                const WeightTile& weight_tile)
      : rows_(rows), D_(D), operands_(operands, stride, {true, true}), stride_(stride), weight_tile_(weight_tile) {}

  // Of a single group, whose weights stay in registers.
  __device__ __forceinline__ void write_of_one_group() {
    const Weights weights[2] = {weights_of(0, 0), weights_of(0, 1)};
    const int tiles = tile_count();
    const auto copy = [&](int first, int ahead) {
      if (first + ahead < tiles) operands_.copy(place(ahead % Memory::kPlaces), ahead * Tile::kColumns);
    };
    const auto use = [&](int first, int at) {
      typename Rows::Sums sums = {};
      add(sums, place(at), weights[0], weights[1]);
      rows_.write(sums, at, (first + at) * Tile::kColumns);
    };
    stream_rounds<Memory::kPlaces>(tiles, copy, use, [&] {
      operands_.move(Memory::kPlaces * Tile::kColumns);
      rows_.move(Memory::kPlaces);
    });
  }

  // Tiles are visited by columns, and for each by groups.
  __device__ __forceinline__ void write(int groups) {
    const int count = tile_count() * groups, next_group = 2 * kHeadGroup * static_cast<int>(stride_);
    int copied = 0, group = 0, column = 0;
    const auto copy = [&](int first, int ahead) {
      if (first + ahead >= count) return;
      operands_.copy(place(ahead % Memory::kPlaces), 0);
      const bool is_last = ++copied == groups;
      operands_.move(is_last ? Tile::kColumns - (groups - 1) * next_group : next_group);
      if (is_last) copied = 0;
    };
    typename Rows::Sums sums = {};
    const auto use = [&](int, int at) {
      add(sums, place(at), weights_of(group, 0), weights_of(group, 1));
      if (++group < groups) return;
      rows_.write(sums, 0, column);
      rows_.move(1);
      column += Tile::kColumns;
      group = 0;
      clear(sums);
    };
    stream_rounds<Memory::kPlaces>(count, copy, use, [] {});
  }

 private:
  __device__ __forceinline__ int tile_count() const { return (D_ + Tile::kColumns - 1) / Tile::kColumns; }
  __device__ __forceinline__ static T* place(int i) { return Memory::tokens(i); }
  __device__ __forceinline__ Weights weights_of(int group, int i) const {
    return Products::template by_token<kBlocks>(weight_tile_(group, i));
  }

  __device__ __forceinline__ void add(typename Rows::Sums& sums, const T* tile, const Weights& of_query,
                                      const Weights& of_dpooled) const {
    products_.template add_gradients<kBlocks>(sums, of_query, tile);
    products_.template add_gradients<kBlocks>(sums, of_dpooled, tile + kHeadGroup * Tile::kStride);
  }

  __device__ __forceinline__ static void clear(typename Rows::Sums& sums) {
#pragma unroll
    for (int i = 0; i < kBlocks * Products::kColumnBlocks * 4; ++i) {
      sums[i / 4 / Products::kColumnBlocks][i / 4 % Products::kColumnBlocks][i % 4] = 0;
    }
  }

  Products products_;
  Rows rows_;
  const int D_;
  PoolRows<T, 2> operands_;
  const int64_t stride_;
  const WeightTile weight_tile_;
};

}  // namespace petl::cuda
