// How attention pooling shares out a sample's tokens, and how its tiles lie in shared memory.
//
// A block of threads takes a part of a sample's tokens and, of the heads, a group. Its warps share the depth or the
// columns of every product, so that each has the same to do, however many tokens the part has.
#pragma once
#include "kernels/attention_pool.h"
#include "kernels/cuda/elements.h"

namespace petl::cuda {

constexpr int kPoolWarps = 4, kPoolThreads = 32 * kPoolWarps;
// The height of a tensor core's product, and of a block of tokens.
constexpr int kHeadGroup = 16, kTokenBlock = 16;
constexpr int kMostTokenBlocks = 4;  // of a part

__device__ __forceinline__ int pool_lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int pool_warp() { return threadIdx.x / 32; }
// Samples are two axes of the grid.
__device__ __forceinline__ int64_t pool_sample() { return int64_t{blockIdx.z} * gridDim.y + blockIdx.y; }
__host__ __device__ __forceinline__ int pool_groups(int64_t H) {
  return static_cast<int>((H + kHeadGroup - 1) / kHeadGroup);
}

// A part is whole blocks of tokens; no part has more than one block more than another. All this depends on the number
// of tokens alone, so that neither do results depend on the rest of a batch.
struct PoolParts {
  int count;            // of a sample
  int blocks, greater;  // each part has so many blocks, and the first `greater` one more

  static PoolParts of(int64_t N) {
    const int64_t blocks = (N + kTokenBlock - 1) / kTokenBlock,
                  count = (blocks + kMostTokenBlocks - 1) / kMostTokenBlocks;
    return {static_cast<int>(count), static_cast<int>(blocks / count), static_cast<int>(blocks % count)};
  }

  __device__ __forceinline__ int blocks_of(int part) const { return blocks + (part < greater); }
  __device__ __forceinline__ int first_token(int part) const {
    return (part * blocks + min(part, greater)) * kTokenBlock;
  }
};

// A tile's rows are 256 bytes of tensors' rows. A word is what one thread copies, and of 16-bit tiles what one lane
// names to load a row of a matrix.
template <class T>
struct PoolTile {
  static constexpr int kColumns = 256 / sizeof(T), kWord = 16 / sizeof(T);
  // Words of eight rows lie in different banks, whichever column they are of: words of 16-bit tiles are dealt out
  // anew in each row, without room between the rows. Float32 is read by more patterns, for which padding does.
  static constexpr bool kSwizzled = sizeof(T) == 2;
  static constexpr int kStride = kColumns + (kSwizzled ? 0 : kWord);

  __device__ __forceinline__ static int at(int row, int word) {
    return row * kStride + (kSwizzled ? word ^ (row & 7) : word) * kWord;
  }
};

// Weights, or scores' gradients, [kHeadGroup heads, a part's tokens]; at() is for pairs of tokens.
template <class T>
struct PoolWeightTile {
  static constexpr int kTokens = kMostTokenBlocks * kTokenBlock;
  static constexpr bool kSwizzled = sizeof(T) == 2;
  static constexpr int kStride = kTokens + (kSwizzled ? 0 : 4);
  static constexpr int kElements = kHeadGroup * kStride;
  static_assert(kElements <= kHeadGroup * PoolTile<T>::kStride, "it may take the place of a tile of heads");

  __device__ __forceinline__ static int at(int head, int token) {
    return head * kStride + (kSwizzled ? token ^ (head & 7) * 8 : token);
  }
};

// What one thread copies of the rows of a tile: two words, 128 bytes apart, of every sixteenth row. Eight neighboring
// threads copy 128 bytes of a row.
template <class T, int kBlocks>
class PoolRows {
  using Tile = PoolTile<T>;

 public:
  // Rows that are not valid are not read: zeros take their place.
  template <class IsValid>
  __device__ __forceinline__ PoolRows(const T* rows, int64_t stride, IsValid is_valid) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int row = 16 * i + first_row();
      valid_[i] = is_valid(row);
      source_[i] = rows + (valid_[i] ? row * stride + word() * Tile::kWord : 0);
    }
  }

  // The tile that begins at column `first`, counted from where move() has led.
  __device__ __forceinline__ void copy(T* tile, int first) const { copy_if(tile, first, true, true); }

  // Of which only `width` columns are in the rows.
  __device__ __forceinline__ void copy_part(T* tile, int first, int width) const {
    copy_if(tile, first, word() * Tile::kWord < width, (word() + 8) * Tile::kWord < width);
  }

  __device__ __forceinline__ void move(int64_t elements) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) source_[i] += elements;
  }

 private:
  __device__ __forceinline__ static int first_row() { return threadIdx.x / 8; }
  __device__ __forceinline__ static int word() { return threadIdx.x % 8; }

  __device__ __forceinline__ void copy_if(T* tile, int first, bool low, bool high) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      T* const row = tile + Tile::at(first_row(), word()) + 16 * i * Tile::kStride;
      copy_async(row, source_[i] + first, valid_[i] && low);
      copy_async(row + 8 * Tile::kWord, source_[i] + first + 8 * Tile::kWord, valid_[i] && high);
    }
  }

  const T* source_[kBlocks];
  bool valid_[kBlocks];
};

}  // namespace petl::cuda
