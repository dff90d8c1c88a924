// How both directions of attention pooling are launched.
#pragma once
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention_pool_finish.h"
#include "kernels/cuda/attention_pool_place.h"
#include "kernels/cuda/launch.h"

namespace petl::cuda {

// Samples are two axes of the grid, since one of them ends at 65535.
inline dim3 grid_of(int64_t first, int64_t B) {
  const int64_t layer = std::min<int64_t>(B, 65535);
  return dim3(static_cast<unsigned>(first), static_cast<unsigned>(layer), static_cast<unsigned>(divide_up(B, layer)));
}

template <class T>
dim3 grid_of_groups(const PoolProblem<T>& problem) {
  return grid_of(int64_t{problem.parts.count} << problem.group_bits, problem.B);
}

template <class T>
int64_t rounded_width(int64_t D) {
  return round_up(D, PoolTile<T>::kColumns);
}

inline bool rounds_queries(const AttentionPoolInputs& args) { return args.query.dtype != args.visual.dtype; }

// The queries in the dtype of the tokens, in `memory` if they have another one.
template <class T>
int round_queries(Queue queue, const AttentionPoolInputs& args, T* memory, PoolProblem<T>& problem) {
  problem.query = static_cast<const T*>(args.query.data);
  problem.query_stride = args.query.stride;
  if (!rounds_queries(args)) return 0;
  problem.query = memory;
  problem.query_stride = problem.D;
  return with_element(args.query.dtype, [&](auto element) {
    using Source = decltype(element);
    if constexpr (std::is_same_v<Source, T>) {
      return 0;
    } else {
      const PoolRound<T, Source> task{
          static_cast<const Source*>(args.query.data), args.query.stride, memory, problem.B, problem.H, problem.D};
      return launch(queue, {grid_of(task.H, task.B), kPoolThreads, 0}, &pool_round<T, Source>, task);
    }
  });
}

template <class T>
PoolProblem<T> problem_of(const AttentionPoolInputs& args) {
  const auto [B, N, D, H] = args.size;
  PoolProblem<T> problem = {};
  problem.visual = static_cast<const T*>(args.visual.data);
  problem.visual_sample = args.visual_sample;
  problem.visual_stride = args.visual.stride;
  problem.mask = args.mask;
  problem.scale = args.scale;
  problem.B = B;
  problem.N = static_cast<int>(N);
  problem.D = static_cast<int>(D);
  problem.H = static_cast<int>(H);
  problem.parts = PoolParts::of<T>(N, H);
  while (1 << problem.group_bits < pool_groups(H)) ++problem.group_bits;
  return problem;
}

// Whether parts of samples are to be combined.
template <class T>
bool has_parts(const AttentionPoolInputs& args) {
  return PoolParts::of<T>(args.size.N, args.size.H).count > 1;
}

// Of the sums of all parts, as they are.
template <class T, class Out>
PoolFinish<Out> finish_of(const PoolProblem<T>& problem, const float* sums, int64_t sum_stride, void* out) {
  PoolFinish<Out> finish = {};
  finish.sums = sums;
  finish.sum_stride = sum_stride;
  finish.out = static_cast<Out*>(out);
  finish.B = problem.B;
  finish.parts = problem.parts.count;
  finish.H = problem.H;
  finish.D = problem.D;
  return finish;
}

template <bool kByShares, class T>
int launch_finish(Queue queue, const PoolFinish<T>& task) {
  return launch(queue, {grid_of(task.H, task.B), task.threads(), 0}, &pool_finish<T, kByShares>, task);
}

}  // namespace petl::cuda
