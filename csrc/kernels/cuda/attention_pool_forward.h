// What a block of threads does in the forward of attention pooling: the part of the softmax that is its tokens', and
// the tokens' sums by these weights.
#pragma once
#include "kernels/cuda/attention_pool_scores.h"
#include "kernels/cuda/attention_pool_sums.h"

namespace petl::cuda {

template <class T>
struct PoolForwardTask {
  PoolProblem<T> problem;
  float *best, *total;  // [B, parts, H]: the greatest scores, and the sums of exp(score - best)
  float* sums;          // [B, parts, H, sum_stride]; null where a sample has one part: its sums are
  int64_t sum_stride;
  T* pooled;  // [B * H, D]
};

template <class T, int kBlocks>
class PoolForward {
  using Memory = PoolMemory<T, 1, kBlocks>;
  static constexpr int kSlots = kPoolSlots<kBlocks>;

 public:
  __device__ __forceinline__ static void run(const PoolForwardTask<T>& task, const PoolPlace<T>& place) {
    const PoolProblem<T>& problem = place.problem;
    PoolRows<T, kBlocks> tokens = token_rows<T, kBlocks>(place);
    PoolRows<T, 1> heads[1] = {head_rows(place, problem.query, problem.query_stride)};
    float scores[1][2][kPoolSlots<kBlocks>];
    find_scores<Memory, 1, kBlocks>(tokens, heads, problem.D, scores, [] {});
    float best[2], total[2];
    weigh(place, scores[0], best, total);
    const int64_t row = place.partial_row();
    if (pool_warp() == 0 && pool_lane() % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (pool_head(half) >= place.heads()) continue;
        task.best[row + pool_head(half)] = best[half];
        task.total[row + pool_head(half)] = total[half];
      }
    }
    __syncwarp();
    const T* weights = Memory::heads(0, 0);
    if (task.sums) {
      const PoolPartSums<T> rows(task.sums + row * task.sum_stride, task.sum_stride);
      sum_tokens<Memory, kBlocks>(tokens, weights, problem.D, place.heads(), rows);
    } else {
      const PoolAllSums<T, T> rows(task.pooled + row * problem.D, problem.D, 1 / total[0], 1 / total[1]);
      sum_tokens<Memory, kBlocks>(tokens, weights, problem.D, place.heads(), rows);
    }
  }

 private:
  // The weights relative to the part's greatest scores take the place of the letters. A score that is not a number
  // counts in the total.
  __device__ __forceinline__ static void weigh(const PoolPlace<T>& place, float (&scores)[2][kSlots], float (&best)[2],
                                               float (&total)[2]) {
    bool present[kSlots];
    find_present<kBlocks>(place, present);
    best[0] = best[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2 * kSlots; ++i) {
      float& score = scores[i / kSlots][i % kSlots];
      score = present[i % kSlots] ? place.problem.scale * score : -INFINITY;
      best[i / kSlots] = fmaxf(best[i / kSlots], score);
    }
    reduce_pool_tokens(best, Memory::scratch(), [](float a, float b) { return fmaxf(a, b); });
    total[0] = total[1] = 0;
#pragma unroll
    for (int i = 0; i < 2 * kSlots; ++i) {
      float& weight = scores[i / kSlots][i % kSlots];
      // Where no token takes part all weights are zero.
      weight = expf(weight - (best[i / kSlots] == -INFINITY ? 0 : best[i / kSlots]));
      total[i / kSlots] += weight;
    }
    store_weights<kBlocks>(Memory::heads(0, 0), scores);
    reduce_pool_tokens(total, Memory::scratch() + kPoolWarps * kHeadGroup, Add());
  }
};

template <class T>
int pool_forward_bytes(int tallest) {
  return pool_tile_bytes<T, 1>(tallest) + 2 * kPoolWarps * kHeadGroup * sizeof(float);
}

}  // namespace petl::cuda
