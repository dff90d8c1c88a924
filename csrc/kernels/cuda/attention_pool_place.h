// What a block of threads of attention pooling works on, and where its tiles lie.
#pragma once
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention_pool_tile.h"

namespace petl::cuda {

// What all blocks know.
template <class T>
struct PoolProblem {
  const T* visual;  // [B, N, D]
  int64_t visual_sample, visual_stride;
  const uint8_t* mask;  // [B, N]; null: all tokens take part
  const T* query;       // [B * H, D]
  int64_t query_stride;
  float scale;
  int64_t B;
  int N, D, H, group_bits;  // 2^group_bits groups of heads or less
  PoolParts parts;
};

// Where the tiles of a block lie whose part has kBlocks blocks of tokens. The heads' tiles have done their duty when
// the scores are known; then others take their place.
template <class T, int kOperands, int kBlocks>
struct PoolMemory {
  static constexpr int kTokenElements = kBlocks * kTokenBlock * PoolTile<T>::kStride;
  static constexpr int kHeadElements = kHeadGroup * PoolTile<T>::kStride;
  static constexpr int kPlaceElements = kTokenElements + kOperands * kHeadElements;
  // Places for tiles that are in use, on their way, or kept for the tokens' sums: three, or four where two more blocks
  // of forward still find room on the multiprocessor.
  static constexpr int kPlaceBytes = kPlaceElements * static_cast<int>(sizeof(T));
  static constexpr int kPlaces = kOperands == 1 && 4 * kPlaceBytes <= 74 << 10 ? 4 : 3;
  static constexpr int kBytes = kPlaces * kPlaceBytes;

  __device__ __forceinline__ static T* tokens(int place) {
    return reinterpret_cast<T*>(shared_memory()) + place * kPlaceElements;
  }
  __device__ __forceinline__ static T* heads(int place, int operand) {
    return tokens(place) + kTokenElements + operand * kHeadElements;
  }
  // What follows the tiles.
  __device__ __forceinline__ static float* scratch() { return reinterpret_cast<float*>(tokens(kPlaces)); }
};

// Parts have kernels of their own for every height; a single block of tokens counts as two.
constexpr int kLeastHeight = 2;

// What the tiles take of a problem whose tallest part has so many blocks; others may have one less.
template <class T, int kOperands, int kHeight = kMostTokenBlocks<T>>
int pool_tile_bytes(int tallest) {
  if constexpr (kHeight == kLeastHeight) {
    return PoolMemory<T, kOperands, kHeight>::kBytes;
  } else {
    if (tallest < kHeight) return pool_tile_bytes<T, kOperands, kHeight - 1>(tallest);
    return std::max(PoolMemory<T, kOperands, kHeight>::kBytes, PoolMemory<T, kOperands, kHeight - 1>::kBytes);
  }
}

// Calls run(height) with the height that a part of so many blocks needs, kHeight at most.
template <int kHeight, class Run>
__device__ __forceinline__ void with_height(int blocks, Run run) {
  if constexpr (kHeight > kLeastHeight) {
    if (blocks < kHeight) return with_height<kHeight - 1>(blocks, run);
  }
  run(std::integral_constant<int, kHeight>{});
}

// A block's place in its sample.
template <class T>
struct PoolPlace {
  const PoolProblem<T>& problem;
  int64_t sample;
  int part, first_head;

  // Parts and groups of heads are the grid's first axis: what blocks share of a sample they read at about the same
  // time.
  __device__ __forceinline__ static PoolPlace of_group(const PoolProblem<T>& problem) {
    const int index = static_cast<int>(blockIdx.x), part = index >> problem.group_bits;
    return {problem, pool_sample(), part, (index - (part << problem.group_bits)) * kHeadGroup};
  }
  // Parts alone are the axis.
  __device__ __forceinline__ static PoolPlace of_all_groups(const PoolProblem<T>& problem) {
    return {problem, pool_sample(), static_cast<int>(blockIdx.x), 0};
  }
  // The grid is a little larger than the problem.
  __device__ __forceinline__ bool exists() const { return sample < problem.B && first_head < problem.H; }

  __device__ __forceinline__ int heads() const { return min(kHeadGroup, problem.H - first_head); }
  __device__ __forceinline__ int64_t first_row() const { return sample * problem.H + first_head; }
  // Of the partial results [B, parts, H].
  __device__ __forceinline__ int64_t partial_row() const {
    return (sample * problem.parts.count + part) * problem.H + first_head;
  }
  __device__ __forceinline__ int first_token() const { return problem.parts.first_token(part); }
  __device__ __forceinline__ int tokens() const {
    return min(problem.parts.blocks_of(part) * kTokenBlock, problem.N - first_token());
  }
  // Of some of the part's tokens, whether they take part.
  template <int kCount>
  __device__ __forceinline__ void find_present(const int (&of)[kCount], bool (&present)[kCount]) const {
    const int count = tokens();
#pragma unroll
    for (int i = 0; i < kCount; ++i) present[i] = of[i] < count;
    if (!problem.mask) return;
    const uint8_t* const mask = problem.mask + sample * problem.N + first_token();
#pragma unroll
    for (int i = 0; i < kCount; ++i) present[i] = present[i] && mask[of[i]];
  }
};

template <class T, int kBlocks>
__device__ __forceinline__ PoolRows<T, kBlocks> token_rows(const PoolPlace<T>& place) {
  const PoolProblem<T>& problem = place.problem;
  const T* first = problem.visual + place.sample * problem.visual_sample + place.first_token() * problem.visual_stride;
  int rows[kBlocks];
  bool present[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) rows[i] = PoolRows<T, kBlocks>::row(i);
  place.find_present(rows, present);
  return {first, problem.visual_stride, present};
}

template <class T>
__device__ __forceinline__ PoolRows<T, 1> head_rows(const PoolPlace<T>& place, const T* rows, int64_t stride) {
  const bool present[1] = {PoolRows<T, 1>::row(0) < place.heads()};
  return {rows + place.first_row() * stride, stride, present};
}

}  // namespace petl::cuda
