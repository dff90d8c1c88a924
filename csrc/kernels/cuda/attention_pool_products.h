// The products of attention pooling, one warp's share of each. What a lane adds to a tile's address is worked out once;
// all else is constant.
//
// Sums lie as tensor cores leave them, float32's too: lane 4 g + t holds of each 8-column block columns 2 t and 2 t + 1
// of rows g (sums 0 and 1) and g + 8 (sums 2 and 3).
#pragma once
#include "kernels/cuda/attention_pool_tile.h"
#include "kernels/cuda/product.h"

namespace petl::cuda {

template <class T>
class PoolProducts {
  using Tile = PoolTile<T>;

 public:
  // The warp's columns of a tile, in blocks of eight.
  static constexpr int kColumnBlocks = Tile::kColumns / kPoolWarps / 8;

  // Of a weight tile, as a left operand.
  template <int kBlocks>
  struct Weights {
    uint32_t parts[kBlocks][4];
  };

  __device__ __forceinline__ PoolProducts() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int word = 4 * pool_warp() + 2 * i;
      lane_[i] = Tile::at(pool_lane() % 16, word + pool_lane() / 16);
      column_lane_[i] = Tile::at(pool_lane() / 16 * 8 + pool_lane() % 8, word + pool_lane() / 8 % 2);
    }
  }

  // sums[i] [heads, tokens] += heads_i tokens^T over the warp's columns, of tiles of heads that lie one after another.
  template <int kOperands, int kBlocks>
  __device__ __forceinline__ void add_scores(float (&sums)[kOperands][2 * kBlocks][4], const T* heads,
                                             const T* tokens) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t left[kOperands][4];
#pragma unroll
      for (int i = 0; i < kOperands; ++i) load_matrices(left[i], heads + i * kHeadGroup * Tile::kStride + lane_[step]);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t parts[4];
        load_matrices(parts, tokens + block * kTokenBlock * Tile::kStride + column_lane_[step]);
#pragma unroll
        for (int i = 0; i < kOperands; ++i) {
          multiply_step(sums[i][2 * block], left[i], {parts[0], parts[1]}, T{});
          multiply_step(sums[i][2 * block + 1], left[i], {parts[2], parts[3]}, T{});
        }
      }
    }
  }

  // [heads, tokens]
  template <int kBlocks>
  __device__ __forceinline__ static Weights<kBlocks> by_head(const T* tile) {
    Weights<kBlocks> weights;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) load_matrices(weights.parts[block], tile + lane_of<kBlocks>(block));
    return weights;
  }

  // [tokens, heads]
  template <int kBlocks>
  __device__ __forceinline__ static Weights<kBlocks> by_token(const T* tile) {
    Weights<kBlocks> weights;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t parts[4];
      load_matrices_transposed(parts, tile + lane_of<kBlocks>(block));
#pragma unroll
      for (int i = 0; i < 4; ++i) weights.parts[block][i] = parts[i == 1 ? 2 : i == 2 ? 1 : i];
    }
    return weights;
  }

  // sums [heads, the warp's columns] += weights tokens
  template <int kBlocks>
  __device__ __forceinline__ void add_sums(float (&sums)[kColumnBlocks][4], const Weights<kBlocks>& weights,
                                           const T* tokens) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t parts[4];
        load_matrices_transposed(parts, tokens + block * kTokenBlock * Tile::kStride + lane_[pair]);
        multiply_step(sums[2 * pair], weights.parts[block], {parts[0], parts[1]}, T{});
        multiply_step(sums[2 * pair + 1], weights.parts[block], {parts[2], parts[3]}, T{});
      }
    }
  }

  // sums [tokens, the warp's columns] += weights heads
  template <int kBlocks>
  __device__ __forceinline__ void add_gradients(float (&sums)[kBlocks][kColumnBlocks][4],
                                                const Weights<kBlocks>& weights, const T* heads) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t parts[4];
      load_matrices_transposed(parts, heads + lane_[pair]);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply_step(sums[block][2 * pair], weights.parts[block], {parts[0], parts[1]}, T{});
        multiply_step(sums[block][2 * pair + 1], weights.parts[block], {parts[2], parts[3]}, T{});
      }
    }
  }

 private:
  template <int kBlocks>
  __device__ __forceinline__ static int lane_of(int block) {
    return PoolWeightTile<T, kBlocks>::at(pool_lane() % 16, kTokenBlock * block + pool_lane() / 16 * 8);
  }

  // Where the lane's row of a matrix begins, of both halves of the warp's columns: of rows of a left operand or of
  // depth, and of rows that are columns of a right operand.
  int lane_[2], column_lane_[2];
};

// Multiplied as it is, four steps of depth at a time.
template <>
class PoolProducts<float> {
  using Tile = PoolTile<float>;

 public:
  static constexpr int kColumnBlocks = Tile::kColumns / kPoolWarps / 8;

  // More than registers can hold: they stay in shared memory.
  template <int kBlocks>
  struct Weights {
    const float* tile;
  };

  template <int kOperands, int kBlocks>
  __device__ __forceinline__ void add_scores(float (&sums)[kOperands][2 * kBlocks][4], const float* heads,
                                             const float* tokens) const {
    // Short sums, of a tile's columns, which keeps rounding errors small.
    float parts[kOperands][2 * kBlocks][4] = {};
#pragma unroll 1
    for (int step = 0; step < 8 * kColumnBlocks; step += 4) {
      const int column = first_column() + step;
      float4 left[kOperands][2];
#pragma unroll
      for (int i = 0; i < 2 * kOperands; ++i) left[i / 2][i % 2] = four(heads + (g() + 8 * i) * Tile::kStride + column);
#pragma unroll
      for (int block = 0; block < 2 * kBlocks; ++block) {
        float right[4][2];
        load_right<Order::columns>(right, tokens + 8 * block * Tile::kStride + column, Tile::kStride);
#pragma unroll
        for (int i = 0; i < kOperands; ++i) multiply_step(parts[i][block], left[i], right);
      }
    }
#pragma unroll
    for (int i = 0; i < kOperands * kBlocks * 8; ++i) {
      sums[i / 8 / kBlocks][i / 4 % (2 * kBlocks)][i % 4] += parts[i / 8 / kBlocks][i / 4 % (2 * kBlocks)][i % 4];
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ static Weights<kBlocks> by_head(const float* tile) {
    return {tile};
  }

  template <int kBlocks>
  __device__ __forceinline__ static Weights<kBlocks> by_token(const float* tile) {
    return {tile};
  }

  template <int kBlocks>
  __device__ __forceinline__ void add_sums(float (&sums)[kColumnBlocks][4], const Weights<kBlocks>& weights,
                                           const float* tokens) const {
#pragma unroll 4
    for (int token = 0; token < kBlocks * kTokenBlock; token += 4) {
      using WeightTile = PoolWeightTile<float, kBlocks>;
      const float4 left[2] = {four(weights.tile + WeightTile::at(g(), token)),
                              four(weights.tile + WeightTile::at(g() + 8, token))};
      multiply_columns(sums, left, tokens + token * Tile::kStride);
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ void add_gradients(float (&sums)[kBlocks][kColumnBlocks][4],
                                                const Weights<kBlocks>& weights, const float* heads) const {
    using WeightTile = PoolWeightTile<float, kBlocks>;
#pragma unroll 1
    for (int head = 0; head < kHeadGroup; head += 4) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        float4 left[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* first = weights.tile + WeightTile::at(head, kTokenBlock * block + 8 * half + g());
          left[half] = {first[0], first[WeightTile::kStride], first[2 * WeightTile::kStride],
                        first[3 * WeightTile::kStride]};
        }
        multiply_columns(sums[block], left, heads + head * Tile::kStride);
      }
    }
  }

 private:
  __device__ __forceinline__ static int g() { return pool_lane() / 4; }
  __device__ __forceinline__ static int first_column() { return 8 * kColumnBlocks * pool_warp(); }
  __device__ __forceinline__ static float4 four(const float* from) { return *reinterpret_cast<const float4*>(from); }

  // sums [16, the warp's columns] += left [16, 4] right [4, ...]
  __device__ __forceinline__ static void multiply_columns(float (&sums)[kColumnBlocks][4], const float4 (&left)[2],
                                                          const float* right) {
#pragma unroll
    for (int block = 0; block < kColumnBlocks; ++block) {
      float parts[4][2];
      load_right<Order::depth>(parts, right + first_column() + 8 * block, Tile::kStride);
      multiply_step(sums[block], left, parts);
    }
  }
};

}  // namespace petl::cuda
