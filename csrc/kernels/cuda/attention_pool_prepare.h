// What backward of attention pooling has to know before it sees a token: its operands in order, the means of the
// weights' gradients, and what rounding left out of them.
#pragma once
#include "kernels/cuda/attention_pool_backward.h"

namespace petl::cuda {

// Of a row whose columns lie by eights in neighboring lanes, the columns as slot_of deals them out: of four lanes, each
// gives each one pair.
template <class T>
__device__ __forceinline__ Packed<T> deal_out(const Packed<T>& packed) {
  uint32_t pairs[4] = {packed.words[0].x, packed.words[0].y, packed.words[0].z, packed.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int step = 1 + i / 2, low = i < 2 ? 2 * i : i - 2, high = low + step;
    const bool gives_low = pool_lane() & step;
    const uint32_t received = __shfl_xor_sync(0xffffffffu, gives_low ? pairs[low] : pairs[high], step);
    pairs[low] = gives_low ? received : pairs[low];
    pairs[high] = gives_low ? pairs[high] : received;
  }
  return {{{pairs[0], pairs[1], pairs[2], pairs[3]}}};
}

__device__ __forceinline__ Packed<float> deal_out(const Packed<float>& packed) { return packed; }

// A block's share of the operands of its sample's group; a warp takes whole rows.
template <class T>
__device__ __forceinline__ void pack_operands(const PoolBackwardTask<T>& task, const PoolPlace<T>& place) {
  constexpr int kWarpColumns = 32 * 8, kBatch = 4;
  const PoolProblem<T>& problem = place.problem;
  const int width = static_cast<int>(task.operand_stride), rows = 2 * kHeadGroup;
  const int64_t group = place.sample * pool_groups(problem.H) + place.first_head / kHeadGroup;
  Packed<T>* const target = reinterpret_cast<Packed<T>*>(task.operands + group * rows * width);
  // Not of the first of several parts, whose block has the means to find.
  const int idle = problem.parts.count > 1, share = place.part - idle, shares = problem.parts.count - idle;
  if (share < 0) return;
#pragma unroll 1
  for (int row = share * kPoolWarps + pool_warp(); row < rows; row += shares * kPoolWarps) {
    const int head = row % kHeadGroup;
    const int64_t source_row = place.first_row() + head;
    const T* source = row < kHeadGroup ? problem.query + source_row * problem.query_stride
                                       : task.dpooled + source_row * task.dpooled_stride;
#pragma unroll 1
    for (int first = 0; first < width; first += kBatch * kWarpColumns) {
      Packed<T> columns[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = first + i * kWarpColumns + pool_lane() * 8;
        columns[i] = load_if(head < place.heads() && column < problem.D, source + column);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = first + i * kWarpColumns + pool_lane() * 8;
        const Packed<T> dealt = deal_out(columns[i]);
        if (column < width) target[(row * width + column) / 8] = dealt;
      }
    }
  }
}

template <class T>
class PoolPrepare {
  // The rests are found in one way for all heights of parts: it is rare.
  static constexpr int kBlocks = kMostTokenBlocks<T>;
  using Memory = PoolMemory<T, 2, kBlocks>;

 public:
  static constexpr int kSharedBytes = Memory::kBytes + sizeof(PoolHeadValues) + kPoolWarps * kHeadGroup * sizeof(float);

  // The first part's block finds the means; all blocks of groups with a concentrated head find the rests, and for that
  // the means once more: so it is one launch.
  __device__ __forceinline__ static void run(const PoolBackwardTask<T>& task, const PoolPlace<T>& place) {
    const auto pack = [&] {
      if (task.dvisual) pack_operands(task, place);
    };
    const bool has_rests = has_concentrated_head(task, place);
    if (place.part > 0 && !has_rests) return pack();
    find_means(task, place, pack);
    const int head = static_cast<int>(threadIdx.x);
    if (place.part == 0 && head < place.heads()) task.mean[place.first_row() + head] = values().mean[head];
    if (has_rests) find_rests(task, place);
  }

 private:
  __device__ __forceinline__ static PoolHeadValues& values() {
    return *reinterpret_cast<PoolHeadValues*>(Memory::scratch());
  }

  __device__ __forceinline__ static bool has_concentrated_head(const PoolBackwardTask<T>& task,
                                                               const PoolPlace<T>& place) {
    const bool has = pool_lane() < place.heads() && is_concentrated(task.total[place.first_row() + pool_lane()]);
    return __any_sync(0xffffffffu, has);
  }

  // The pooled rows take the place of tokens, dpooled that of queries: the products of each head with its own row are
  // the means.
  template <class Meanwhile>
  __device__ __forceinline__ static void find_means(const PoolBackwardTask<T>& task, const PoolPlace<T>& place,
                                                    Meanwhile meanwhile) {
    PoolRows<T, 1> pooled = head_rows(place, task.pooled, task.pooled_stride);
    PoolRows<T, 1> dpooled[1] = {head_rows(place, task.dpooled, task.dpooled_stride)};
    float products[1][2][kPoolSlots<1>];
    find_scores<Memory, 1, 1>(pooled, dpooled, place.problem.D, products, meanwhile);
    const int g = pool_lane() / 4;
    if (pool_warp() == 0 && pool_lane() % 4 == g / 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&own)[4] = products[0][half];
        values().mean[pool_head(half)] = g % 2 == 0 ? own[2 * half] : own[2 * half + 1];
      }
    }
    __syncthreads();
  }

  // The part's share of what rounding left out of the means: the sum of all dscores is zero but for it.
  __device__ __forceinline__ static void find_rests(const PoolBackwardTask<T>& task, const PoolPlace<T>& place) {
    PoolRows<T, kBlocks> tokens = token_rows<T, kBlocks>(place);
    PoolDifferentials<kBlocks> found;
    found.find(task, place, tokens, values(), [&] { values().load(task, place); });
    float rest[2] = {};
#pragma unroll
    for (int i = 0; i < 2 * found.kSlots; ++i)
      rest[i / found.kSlots] += found.dscores[i / found.kSlots][i % found.kSlots];
    reduce_pool_tokens(rest, reinterpret_cast<float*>(&values() + 1), Add());
    if (pool_warp() != 0 || pool_lane() % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = pool_head(half);
      if (head < place.heads()) task.rests[place.partial_row() + head] = rest[half];
    }
  }
};

}  // namespace petl::cuda
