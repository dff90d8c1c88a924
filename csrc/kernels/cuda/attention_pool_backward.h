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
  float* sums;  // [B, parts, H, sum_stride]; null: not needed, or a sample has one part
  int64_t sum_stride;
  float* dquery;  // [B * H, D]; null: not needed
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

// Of a thread's tokens and heads: the weights, and the gradients of the scores but for their scale.
template <int kBlocks>
struct PoolDifferentials {
  static constexpr int kSlots = kPoolSlots<kBlocks>;
  float weights[2][kSlots], dscores[2][kSlots];

  // From a group's products with the part's tokens; load() loads the heads' values.
  template <class T, class Load>
  __device__ __forceinline__ void find(const PoolBackwardTask<T>& task, const PoolPlace<T>& place,
                                       PoolRows<T, kBlocks>& tokens, const PoolHeadValues& of, Load load) {
    const PoolProblem<T>& problem = place.problem;
    PoolRows<T, 1> heads[2] = {head_rows(place, problem.query, problem.query_stride),
                               head_rows(place, task.dpooled, task.dpooled_stride)};
    float products[2][2][kSlots];
    find_scores<PoolMemory<T, 2, kBlocks>, 2, kBlocks>(tokens, heads, problem.D, products, load);
    bool present[kSlots];
    find_present<kBlocks>(place, present);
#pragma unroll
    for (int i = 0; i < 2 * kSlots; ++i) {
      const int half = i / kSlots, slot = i % kSlots, head = pool_head(half);
      const bool counts = present[slot] && head < place.heads();
      const float score = problem.scale * products[0][half][slot], dweight = products[1][half][slot];
      const float weight = expf(score - of.best[head]) * of.factor[head];
      weights[half][slot] = counts ? weight : 0;
      dscores[half][slot] = counts ? weight * ((dweight - of.mean[head]) - of.rest[head]) : 0;
    }
  }
};

// kOneGroup: whether all heads are of one group.
template <class T, int kBlocks, bool kOneGroup>
class PoolBackward {
  using Memory = PoolMemory<T, 2, kBlocks>;
  using WeightTile = PoolWeightTile<T, kBlocks>;

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
    const auto tile_of = [](int group, int i) { return weight_tile(group, i); };
    PoolTokenGradients<Memory, kBlocks, T, decltype(tile_of)> gradients(rows, problem.D, operands, task.operand_stride,
                                                                        tile_of);
    if constexpr (kOneGroup) {
      gradients.write_of_one_group();
    } else {
      gradients.write(groups);
    }
  }

 private:
  __device__ __forceinline__ static PoolHeadValues& values() {
    return *reinterpret_cast<PoolHeadValues*>(Memory::scratch());
  }

  // Of a group the gradients of its scores (0) and its weights (1). Of a single one they take the place of heads'
  // tiles, which the next group would need again.
  __device__ __forceinline__ static T* weight_tile(int group, int i) {
    T* const behind = reinterpret_cast<T*>(&values() + 1);
    return kOneGroup ? Memory::heads(i, 0) : behind + (2 * group + i) * WeightTile::kElements;
  }

  __device__ __forceinline__ static void run_group(const PoolBackwardTask<T>& task, const PoolPlace<T>& place,
                                                   int group) {
    PoolRows<T, kBlocks> tokens = token_rows<T, kBlocks>(place);
    PoolDifferentials<kBlocks> found;
    found.find(task, place, tokens, values(), [&] {
      values().load(task, place);
      values().load_mean(task, place);
    });
#pragma unroll
    for (int i = 0; i < 2 * found.kSlots; ++i) found.dscores[i / found.kSlots][i % found.kSlots] *= place.problem.scale;
    // All have read their letters.
    __syncthreads();
    store_weights<kBlocks>(weight_tile(group, 0), found.dscores);
    store_weights<kBlocks>(weight_tile(group, 1), found.weights);
    __syncthreads();
    const int64_t row = place.partial_row();
    const T* weights = weight_tile(group, 0);
    if (task.sums) {
      const PoolPartSums<T> rows(task.sums + row * task.sum_stride, task.sum_stride);
      sum_tokens<Memory, kBlocks>(tokens, weights, place.problem.D, place.heads(), rows);
    } else if (task.dquery) {
      const PoolAllSums<T, float> rows(task.dquery + row * place.problem.D, place.problem.D, 1, 1);
      sum_tokens<Memory, kBlocks>(tokens, weights, place.problem.D, place.heads(), rows);
    }
  }
};

template <class T>
int pool_backward_bytes(int tallest, int64_t H) {
  const int groups = pool_groups(H), weight_tiles = groups > 1 ? 2 * groups : 0;
  return pool_tile_bytes<T, 2>(tallest) + sizeof(PoolHeadValues) +
         weight_tiles * PoolWeightTile<T, kMostTokenBlocks<T, false>>::kElements * sizeof(T);
}

}  // namespace petl::cuda
