// The small launches beside those of attention pooling's blocks: queries are rounded, the parts' sums combined.
#pragma once
#include "kernels/cuda/attention_pool_tile.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

// Rows [B * H, D] in the dtype of the products.
template <class T, class Source>
struct PoolRound {
  const Source* rows;
  int64_t stride;
  T* out;
  int64_t B;
  int H, D;

  int64_t blocks() const { return (int64_t{H} * (D / 8) + kPoolThreads - 1) / kPoolThreads; }
};

template <class T, class Source>
__global__ void __launch_bounds__(kPoolThreads) pool_round(const __grid_constant__ PoolRound<T, Source> task) {
  const unsigned vector = blockIdx.x * kPoolThreads + threadIdx.x, row_vectors = task.D / 8;
  const unsigned head = vector / row_vectors, column = vector % row_vectors * 8;
  const int64_t row = pool_sample() * task.H + head;
  if (pool_sample() >= task.B || head >= static_cast<unsigned>(task.H)) return;
  float values[8];
  unpack(load(task.rows + row * task.stride + column), values);
  store(task.out + row * task.D + column, pack<T>(values));
}

// The parts' sums of one head to its row: by their shares of the softmax in forward, as they are in backward.
template <class T>
struct PoolFinish {
  const float* sums;  // [B, parts, H, sum_stride]
  int64_t sum_stride;
  const float *best, *total;  // [B, parts, H]; null: the sums count as they are
  T* out;                     // [B * H, D]
  float* statistics;          // [2, B * H], with best
  int64_t B;
  int parts, H, D;

  // A warp takes so many columns of a row, each lane of each word four.
  static constexpr int kWords = 2, kWarpColumns = 32 * 4 * kWords;

  __host__ __device__ int tiles() const { return (D + kWarpColumns - 1) / kWarpColumns; }
  int64_t blocks() const { return (int64_t{H} * tiles() + kPoolWarps - 1) / kPoolWarps; }
};

// A head's shares of the softmax in its parts. A part of which no token takes part has minus infinity for its greatest
// score; a sample of such parts becomes NaN.
template <class T>
class PoolShares {
 public:
  // Of the parts whose best and total begin at `first`, by the whole warp.
  __device__ __forceinline__ PoolShares(const PoolFinish<T>& task, int64_t first) : task_(task), first_(first) {
    if (!task.best) return;
    best_ = -INFINITY;
#pragma unroll 1
    for (int part = pool_lane(); part < task.parts; part += 32) best_ = Max()(best_, best_of(part));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) best_ = Max()(best_, __shfl_xor_sync(0xffffffffu, best_, lanes));
#pragma unroll 1
    for (int part = pool_lane(); part < task.parts; part += 32) {
      total_ += expf(best_of(part) - best_) * task.total[first_ + int64_t{part} * task.H];
    }
    total_ = sum_warp(total_);
  }

  __device__ __forceinline__ float of_part(int part) const {
    return task_.best ? expf(best_of(part) - best_) / total_ : 1.0f;
  }

  __device__ __forceinline__ void store_statistics(int64_t row) const {
    task_.statistics[row] = best_;
    task_.statistics[task_.B * task_.H + row] = total_;
  }

 private:
  __device__ __forceinline__ float best_of(int part) const { return task_.best[first_ + int64_t{part} * task_.H]; }

  const PoolFinish<T>& task_;
  int64_t first_;
  float best_ = 0, total_ = 0;
};

template <class T>
__device__ __forceinline__ void store_four(T* to, const float4& values) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(to) = {pack_pair(values.x, values.y, T{}), pack_pair(values.z, values.w, T{})};
  } else {
    *reinterpret_cast<float4*>(to) = values;
  }
}

// Of one row and a warp's columns, the sums of a few parts: all loads are under way at the same time.
template <class T>
struct PoolBatch {
  static constexpr int kParts = 4, kWords = PoolFinish<T>::kWords;
  float4 words[kParts][kWords];

  __device__ __forceinline__ void load(const PoolFinish<T>& task, const float* sums, int first_part, int column) {
#pragma unroll
    for (int i = 0; i < kParts * kWords; ++i) {
      const int part = first_part + i / kWords, offset = column + i % kWords * 128;
      const bool valid = part < task.parts && offset < task.D;
      const float* from = sums + int64_t{part} * task.H * task.sum_stride + offset;
      words[i / kWords][i % kWords] = valid ? *reinterpret_cast<const float4*>(from) : float4{};
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

template <class T>
__global__ void __launch_bounds__(kPoolThreads) pool_finish(const __grid_constant__ PoolFinish<T> task) {
  using Batch = PoolBatch<T>;
  const int item = static_cast<int>(blockIdx.x) * kPoolWarps + pool_warp();
  const int head = item / task.tiles(), column = item % task.tiles() * PoolFinish<T>::kWarpColumns + pool_lane() * 4;
  const int64_t sample = pool_sample(), row = sample * task.H + head;
  if (sample >= task.B || head >= task.H) return;
  const int64_t first = sample * task.parts * task.H + head;
  const float* sums = task.sums + first * task.sum_stride;
  Batch batch;
  batch.load(task, sums, 0, column);
  const PoolShares<T> shares(task, first);
  float4 values[PoolFinish<T>::kWords] = {};
#pragma unroll 1
  for (int part = 0; part < task.parts; part += Batch::kParts) {
    if (part > 0) batch.load(task, sums, part, column);
#pragma unroll
    for (int i = 0; i < Batch::kParts; ++i) {
      if (part + i < task.parts) batch.add_to(values, i, shares.of_part(part + i));
    }
  }
#pragma unroll
  for (int i = 0; i < PoolFinish<T>::kWords; ++i) {
    if (column + i * 128 < task.D) store_four(task.out + row * task.D + column + i * 128, values[i]);
  }
  if (task.best && column == 0) shares.store_statistics(row);
}

}  // namespace petl::cuda
