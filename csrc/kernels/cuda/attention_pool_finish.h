// The small launches beside those of attention pooling's blocks: queries are rounded, the parts' sums combined.
#pragma once
#include "kernels/cuda/attention_pool_tile.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

// Rows [B * H, D] in the dtype of the products; a block takes one.
template <class T, class Source>
struct PoolRound {
  const Source* rows;
  int64_t stride;
  T* out;
  int64_t B;
  int H, D;
};

template <class T, class Source>
__global__ void __launch_bounds__(kPoolThreads) pool_round(const __grid_constant__ PoolRound<T, Source> task) {
  if (pool_sample() >= task.B) return;
  const int64_t row = pool_sample() * task.H + blockIdx.x;
  for (int column = threadIdx.x * 8; column < task.D; column += kPoolThreads * 8) {
    float values[8];
    unpack(load(task.rows + row * task.stride + column), values);
    reinterpret_cast<Packed<T>*>(task.out)[(row * task.D + column) / 8] = pack<T>(values);
  }
}

// The parts' sums of one head to its row: by their shares of the softmax, as in forward, or as they are.
template <class T>
struct PoolFinish {
  const float* sums;  // [B, parts, H, sum_stride]
  int64_t sum_stride;
  const float *best, *total;  // [B, parts, H]
  T* out;                     // [B * H, D]
  float* statistics;          // [2, B * H]
  int64_t B;
  int parts, H, D;

  // A block takes a row, and a warp so many of its columns: each lane words of four.
  static constexpr int kWords = 2, kWarpColumns = 32 * 4 * kWords;
  static constexpr int kMostThreads = static_cast<int>(kMaxWidth) / kWarpColumns * 32;

  int threads() const { return (D + kWarpColumns - 1) / kWarpColumns * 32; }
};

// A head's greatest score of all parts, and the sum of exp(score - best), by a whole warp. A part of which no token
// takes part has minus infinity for its greatest score; a sample of such parts becomes NaN.
struct PoolSoftmax {
  float best = -INFINITY, total = 0;

  // Of values that are `stride` apart.
  __device__ __forceinline__ PoolSoftmax(const float* of_part, const float* total_of_part, int parts, int64_t stride) {
#pragma unroll 1
    for (int part = pool_lane(); part < parts; part += 32) best = Max()(best, of_part[part * stride]);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) best = Max()(best, __shfl_xor_sync(0xffffffffu, best, lanes));
#pragma unroll 1
    for (int part = pool_lane(); part < parts; part += 32) {
      total += expf(of_part[part * stride] - best) * total_of_part[part * stride];
    }
    total = sum_warp(total);
  }
};

template <class T>
__device__ __forceinline__ void store_four(T* to, const float4& values) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(to) = {pack_pair(values.x, values.y, T{}), pack_pair(values.z, values.w, T{})};
  } else {
    *reinterpret_cast<float4*>(to) = values;
  }
}

// Of one row and a warp's columns, the sums of a few parts, all of whose loads are under way at the same time.
template <class T>
struct PoolBatch {
  static constexpr int kParts = 4, kWords = PoolFinish<T>::kWords;
  float4 words[kParts][kWords];

  __device__ __forceinline__ void load(const PoolFinish<T>& task, const float* sums, int first_part, int column) {
    const int64_t part_stride = task.H * task.sum_stride;
#pragma unroll
    for (int i = 0; i < kParts * kWords; ++i) {
      const int part = first_part + i / kWords, offset = column + i % kWords * 128;
      const bool valid = part < task.parts && offset < task.D;
      words[i / kWords][i % kWords] =
          valid ? *reinterpret_cast<const float4*>(sums + part * part_stride + offset) : float4{};
    }
  }

  __device__ __forceinline__ void add_to(float4 (&values)[kWords], int part, float share) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float4& word = words[part][i];
      values[i] = {fmaf(share, word.x, values[i].x), fmaf(share, word.y, values[i].y), fmaf(share, word.z, values[i].z),
                   fmaf(share, word.w, values[i].w)};
    }
  }
};

template <class T, bool kByShares>
__global__ void __launch_bounds__(PoolFinish<T>::kMostThreads) pool_finish(const __grid_constant__ PoolFinish<T> task) {
  using Batch = PoolBatch<T>;
  constexpr int kWords = PoolFinish<T>::kWords;
  if (pool_sample() >= task.B) return;
  const int column = pool_warp() * PoolFinish<T>::kWarpColumns + pool_lane() * 4;
  const int64_t row = pool_sample() * task.H + blockIdx.x, first = pool_sample() * task.parts * task.H + blockIdx.x;
  const float* sums = task.sums + first * task.sum_stride;
  Batch batch;
  batch.load(task, sums, 0, column);
  float own_share = 1;  // of part `part` / 32 * 32 + lane
  float4 values[kWords] = {};
  const PoolSoftmax softmax(task.best + first, task.total + first, kByShares ? task.parts : 0, task.H);
#pragma unroll 1
  for (int part = 0; part < task.parts; part += Batch::kParts) {
    if (part > 0) batch.load(task, sums, part, column);
    if (kByShares && part % 32 == 0) {
      const int own = part + pool_lane();
      own_share = own < task.parts ? expf(task.best[first + int64_t{own} * task.H] - softmax.best) / softmax.total : 0;
    }
#pragma unroll
    for (int i = 0; i < Batch::kParts; ++i) {
      batch.add_to(values, i, __shfl_sync(0xffffffffu, own_share, (part + i) % 32));
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (column + i * 128 < task.D) store_four(task.out + row * task.D + column + i * 128, values[i]);
  }
  if (kByShares && threadIdx.x == 0) {
    task.statistics[row] = softmax.best;
    task.statistics[task.B * task.H + row] = softmax.total;
  }
}

}  // namespace petl::cuda
