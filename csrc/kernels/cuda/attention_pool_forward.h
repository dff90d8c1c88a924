// What a block of threads does in the forward of attention pooling: the part of the softmax that is its tokens', and
// the tokens' sums by these weights.
#pragma once
#include "kernels/cuda/attention_pool_scores.h"
#include "kernels/cuda/attention_pool_sums.h"

namespace petl::cuda {

template <class T>
struct PoolForwardTask {
  PoolProblem<T> problem;
  float* sums;  // [B, parts, H, sum_stride]
  int64_t sum_stride;
  float* best;   // [B, parts, H], the greatest scores
  float* total;  // the same, of exp(score - best)
};

template <class T, int kBlocks>
class PoolForward {
  using Memory = PoolMemory<T, 1, kBlocks>;

 public:
  __device__ __forceinline__ static void run(const PoolForwardTask<T>& task, const PoolPlace<T>& place) {
    const PoolProblem<T>& problem = place.problem;
    PoolRows<T, kBlocks> tokens = token_rows<T, kBlocks>(place);
    PoolRows<T, 1> heads[1] = {head_rows(place, problem.query, problem.query_stride)};
    PoolScores scores[1];
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
    sum_tokens<Memory, kBlocks>(tokens, Memory::heads(0, 0), problem.D, place.heads(),
                                task.sums + row * task.sum_stride, task.sum_stride);
  }

 private:
  // The weights relative to the part's greatest scores take the place of the letters.
  __device__ __forceinline__ static void weigh(const PoolPlace<T>& place, const PoolScores& scores, float (&best)[2],
                                               float (&total)[2]) {
    const float scale = place.problem.scale;
    bool present[2][2];
    find_present<kBlocks>(place, present);
    best[0] = best[1] = -INFINITY;
    scores.for_each([&](int half, int block, int i, float score) {
      if (present[block][i]) best[half] = Max()(best[half], scale * score);
    });
    reduce_pool_tokens(best, Memory::scratch(), Max());
    float weights[2][2][2];
    total[0] = total[1] = 0;
    scores.for_each([&](int half, int block, int i, float score) {
      const float weight = present[block][i] ? expf(scale * score - best[half]) : 0.0f;
      total[half] += weight;
      weights[half][block][i] = weight;
    });
    if (pool_warp() < kBlocks) store_weights(Memory::heads(0, 0), weights);
    reduce_pool_tokens(total, Memory::scratch() + kPoolWarps * kHeadGroup, Add());
  }
};

template <class T>
constexpr int kPoolForwardBytes = pool_tile_bytes<T, 1>() + 2 * kPoolWarps * kHeadGroup * sizeof(float);

}  // namespace petl::cuda
