// What a block of threads does in the backward of attention pooling, when attention_pool_prepare.h has done its duty.
#pragma once
#include "kernels/cuda/attention_pool_gradients.h"
#include "kernels/cuda/attention_pool_scores.h"
#include "kernels/cuda/attention_pool_sums.h"

namespace petl::cuda {

template <class T>
struct PoolBackwardTask {
  PoolProblem<T> problem;
  const T *dpooled, *pooled;  // [B * H, D]
  int64_t dpooled_stride, pooled_stride;
  const float *best, *total;  // [B * H]
  float* mean;                // [B * H], dpooled . pooled
  float* rests;               // [B, parts, H], shares of what rounding left out of it; only of groups of heads that
                              // have a concentrated one
  // [B, groups, 2, kHeadGroup, operand_stride], query and dpooled as the tokens' gradients are made of them: zeros
  // beyond H and D, and columns of 16-bit elements in the order of slot_of.
  T* operands;
  int64_t operand_stride;
  T* dvisual;   // [B, N, D]; null: not needed
  float* sums;  // [B, parts, H, sum_stride]; null: not needed
  int64_t sum_stride;
};

// Where one token has most of a head's weight, its product with dpooled is nearly the mean, and of their difference, on
// which the gradients depend, rounding leaves little. Of such heads the mean is corrected, for which the sample's
// tokens are read once more. The greatest weight is 1 / total, the sum of exp(score - best).
__device__ __forceinline__ bool is_concentrated(float total) { return total < 2; }

// What backward knows of each head of a group before it sees a token; `factor` is 1 / total.
struct PoolHeadValues {
  float best[kHeadGroup], factor[kHeadGroup], mean[kHeadGroup], rest[kHeadGroup];

  // Thread h cares for head h. The mean is not among them.
  template <class T>
  __device__ __forceinline__ void load(const PoolBackwardTask<T>& task, const PoolPlace<T>& place) {
    const int head = static_cast<int>(threadIdx.x);
    if (head >= place.heads()) return;
    const int64_t row = place.first_row() + head;
    best[head] = task.best[row];
    factor[head] = 1 / task.total[row];
    rest[head] = 0;
  }

  template <class T>
  __device__ __forceinline__ void load_mean(const PoolBackwardTask<T>& task, const PoolPlace<T>& place) {
    const int head = static_cast<int>(threadIdx.x);
    if (head >= place.heads()) return;
    const int64_t row = place.first_row() + head;
    mean[head] = task.mean[row];
    if (!is_concentrated(task.total[row])) return;
    const int parts = task.problem.parts.count;
    float sum = 0;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      sum += task.rests[(place.sample * parts + part) * task.problem.H + place.first_head + head];
    }
    rest[head] = sum;
  }
};

// Of a thread's tokens and heads, as PoolScores has them: the weights, and the gradients of the scores but for their
// scale.
struct PoolDifferentials {
  float weights[2][2][2], dscores[2][2][2];

  template <int kBlocks, class T>
  __device__ __forceinline__ void find(const PoolPlace<T>& place, const PoolScores (&products)[2],
                                       const PoolHeadValues& of) {
    bool present[2][2];
    find_present<kBlocks>(place, present);
    const float scale = place.problem.scale;
    products[0].for_each([&](int half, int block, int i, float score) {
      const int head = pool_head(half);
      const float dweight = products[1].parts[block][2 * half + i];
      float &weight = weights[half][block][i], &dscore = dscores[half][block][i];
      weight = dscore = 0;
      if (!present[block][i] || head >= place.heads()) return;
      weight = expf(scale * score - of.best[head]) * of.factor[head];
      dscore = weight * ((dweight - of.mean[head]) - of.rest[head]);
    });
  }
};

// A group's products with the part's tokens, and what follows of them; load() loads the heads' values.
template <int kBlocks, class T, class Load>
__device__ __forceinline__ void find_differentials(const PoolBackwardTask<T>& task, const PoolPlace<T>& place,
                                                   PoolRows<T, kBlocks>& tokens, const PoolHeadValues& of, Load load,
                                                   PoolDifferentials& found) {
  const PoolProblem<T>& problem = place.problem;
  PoolRows<T, 1> heads[2] = {head_rows(place, problem.query, problem.query_stride),
                             head_rows(place, task.dpooled, task.dpooled_stride)};
  PoolScores products[2];
  find_scores<PoolMemory<T, 2, kBlocks>, 2, kBlocks>(tokens, heads, problem.D, products, load);
  found.find<kBlocks>(place, products, of);
}

// kOneGroup: whether all heads are of one group.
template <class T, int kBlocks, bool kOneGroup>
class PoolBackward {
  using Memory = PoolMemory<T, 2, kBlocks>;

 public:
  __device__ __forceinline__ static void run(const PoolBackwardTask<T>& task, const PoolPlace<T>& place) {
    const PoolProblem<T>& problem = place.problem;
    const int groups = kOneGroup ? 1 : pool_groups(problem.H);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      run_group(task, {problem, place.sample, place.part, group * kHeadGroup}, group);
      // The next tiles take the place of these.
      __syncthreads();
    }
    if (!task.dvisual) return;
    const PoolGradientRows<T, kBlocks> rows(task.dvisual + (place.sample * problem.N + place.first_token()) * problem.D,
                                            place.tokens(), problem.D);
    const T* operands = task.operands + place.sample * groups * 2 * kHeadGroup * task.operand_stride;
    write_gradients<kOneGroup, Memory>(rows, problem.D, operands, task.operand_stride, groups, weight_tile);
  }

 private:
  __device__ __forceinline__ static PoolHeadValues& values() {
    return *reinterpret_cast<PoolHeadValues*>(Memory::scratch());
  }

  // Of a group the gradients of its scores (0) and its weights (1). Of a single one they take the place of heads'
  // tiles, which the next group would need again.
  __device__ __forceinline__ static T* weight_tile(int group, int i) {
    T* const behind = reinterpret_cast<T*>(&values() + 1);
    return kOneGroup ? Memory::heads(i, 0) : behind + (2 * group + i) * PoolWeightTile<T>::kElements;
  }

  __device__ __forceinline__ static void run_group(const PoolBackwardTask<T>& task, const PoolPlace<T>& place,
                                                   int group) {
    PoolRows<T, kBlocks> tokens = token_rows<T, kBlocks>(place);
    PoolDifferentials found;
    const auto load = [&] {
      values().load(task, place);
      values().load_mean(task, place);
    };
    find_differentials<kBlocks>(task, place, tokens, values(), load, found);
#pragma unroll
    for (int i = 0; i < 8; ++i) found.dscores[i / 4][i / 2 % 2][i % 2] *= place.problem.scale;
    // All have read their letters.
    __syncthreads();
    if (pool_warp() < kBlocks) {
      store_weights(weight_tile(group, 0), found.dscores);
      store_weights(weight_tile(group, 1), found.weights);
    }
    __syncthreads();
    if (!task.sums) return;
    const int64_t row = place.partial_row();
    sum_tokens<Memory, kBlocks>(tokens, weight_tile(group, 0), place.problem.D, place.heads(),
                                task.sums + row * task.sum_stride, task.sum_stride);
  }
};

template <class T>
int pool_backward_bytes(int64_t H) {
  const int groups = pool_groups(H), weight_tiles = groups > 1 ? 2 * groups : 0;
  return pool_tile_bytes<T, 2>() + sizeof(PoolHeadValues) + weight_tiles * PoolWeightTile<T>::kElements * sizeof(T);
}

}  // namespace petl::cuda
