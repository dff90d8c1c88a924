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
// Of a part. Tall parts leave fewer sums to combine; at this height a multiprocessor runs three blocks in forward and
// two in backward, of which several groups of heads take more registers and shared memory, and so does float32.
template <class T, bool kOneGroup = true>
constexpr int kMostTokenBlocks = 3 + (sizeof(T) == 2) + kOneGroup;

__device__ __forceinline__ int pool_lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int pool_warp() { return threadIdx.x / 32; }
// Samples are two axes of the grid.
__device__ __forceinline__ int64_t pool_sample() { return int64_t{blockIdx.z} * gridDim.y + blockIdx.y; }
__host__ __device__ __forceinline__ int pool_groups(int64_t H) {
  return static_cast<int>((H + kHeadGroup - 1) / kHeadGroup);
}

// A part is whole blocks of tokens; no part has more than one block more than another. All this depends on the numbers
// of tokens and heads alone, so that no sample's results depend on the rest of a batch.
struct PoolParts {
  int count;            // of a sample
  int blocks, greater;  // each part has so many blocks, and the first `greater` one more

  template <class T>
  static PoolParts of(int64_t N, int64_t H) {
    const int most = H <= kHeadGroup ? kMostTokenBlocks<T, true> : kMostTokenBlocks<T, false>;
    const int64_t blocks = (N + kTokenBlock - 1) / kTokenBlock, count = (blocks + most - 1) / most;
    return {static_cast<int>(count), static_cast<int>(blocks / count), static_cast<int>(blocks % count)};
  }
  int tallest() const { return blocks + (greater > 0); }

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

// Weights, or scores' gradients, [kHeadGroup heads, tokens of kBlocks blocks]; at() is for pairs of tokens.
template <class T, int kBlocks>
struct PoolWeightTile {
  static constexpr int kTokens = kBlocks <= 4 ? 64 : 128;
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
  // Rows that are not present are not read: zeros take their place.
  __device__ __forceinline__ PoolRows(const T* rows, int64_t stride, const bool (&present)[kBlocks]) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      present_[i] = present[i];
      source_[i] = rows + (present[i] ? row(i) * stride + word() * Tile::kWord : 0);
    }
  }

  __device__ __forceinline__ static int row(int i) { return 16 * i + threadIdx.x / 8; }

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
  __device__ __forceinline__ static int word() { return threadIdx.x % 8; }

  __device__ __forceinline__ void copy_if(T* tile, int first, bool low, bool high) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      T* const to = tile + Tile::at(row(0), word()) + 16 * i * Tile::kStride;
      copy_async(to, source_[i] + first, present_[i] && low);
      copy_async(to + 8 * Tile::kWord, source_[i] + first + 8 * Tile::kWord, present_[i] && high);
    }
  }

  const T* source_[kBlocks];
  bool present_[kBlocks];
};

template <class T>
__device__ __forceinline__ void store_pair(T* to, float low, float high) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack_pair(low, high, T{});
  } else {
    *reinterpret_cast<float2*>(to) = {low, high};
  }
}

// A part's tokens and a group's heads are one thread's in pairs: heads g and g + 8 (for lane 4 g + t), and of every
// fourth block, beginning with the warp's number, tokens 2 t, 2 t + 1, 8 + 2 t and 8 + 2 t + 1. Values of these are
// arrays [2][kPoolSlots<kBlocks>].
template <int kBlocks>
constexpr int kPoolSlots = (kBlocks + kPoolWarps - 1) / kPoolWarps * 4;

__device__ __forceinline__ int pool_head(int half) { return pool_lane() / 4 + 8 * half; }
__device__ __forceinline__ int pool_block(int slot) { return pool_warp() + slot / 4 * kPoolWarps; }
__device__ __forceinline__ int pool_token(int slot) {
  return kTokenBlock * pool_block(slot) + slot / 2 % 2 * 8 + pool_lane() % 4 * 2 + slot % 2;
}

}  // namespace petl::cuda
