// Attention pooling on CUDA, forward. A block of threads takes a part of one sample's tokens: their products with the
// queries, the part of the softmax that is theirs, and the tokens' sums by these weights; where there are several
// parts, a second launch combines them in order. Queries in another dtype than the tokens' are rounded beforehand,
// once.
#include "kernels/cuda/attention_pool.h"
#include "kernels/cuda/attention_pool_forward.h"
#include "kernels/cuda/attention_pool_launch.h"

namespace petl::cuda {
namespace {

// Blocks that a multiprocessor shall be able to run at once: a bound for the compiler's use of registers.
constexpr int kForwardBlocks = 3;

template <class T>
__global__ void __launch_bounds__(kPoolThreads, kForwardBlocks)
    pool_forward(const __grid_constant__ PoolForwardTask<T> task) {
  const PoolPlace<T> place = PoolPlace<T>::of_group(task.problem);
  if (!place.exists()) return;
  const int blocks = task.problem.parts.blocks_of(place.part);
  with_height<kMostTokenBlocks<T>>(blocks,
                                   [&](auto blocks) { PoolForward<T, decltype(blocks)::value>::run(task, place); });
}

template <class T>
struct PoolForwardWorkspace {
  int64_t sum_stride;
  T* query = nullptr;
  float *sums = nullptr, *best = nullptr, *total = nullptr;
  int64_t bytes;

  PoolForwardWorkspace(const AttentionPoolInputs& args, void* memory) {
    Partition partition(memory);
    const auto [B, N, D, H] = args.size;
    const int64_t rows = B * PoolParts::of<T>(N, H).count * H;
    sum_stride = rounded_width<T>(D);
    if (rounds_queries(args)) query = partition.take<T>(B * H * D);
    if (has_parts<T>(args)) {
      sums = partition.take<float>(rows * sum_stride);
      best = partition.take<float>(rows);
      total = partition.take<float>(rows);
    }
    bytes = partition.bytes();
  }
};

template <class T>
int forward(const AttentionPoolForward& args, void* memory, Queue queue) {
  const auto [B, N, D, H] = args.inputs.size;
  if (B == 0) return 0;
  const PoolForwardWorkspace<T> workspace(args.inputs, memory);
  PoolForwardTask<T> task = {};
  task.problem = problem_of<T>(args.inputs);
  const bool parts = has_parts<T>(args.inputs);
  task.best = parts ? workspace.best : args.statistics;
  task.total = parts ? workspace.total : args.statistics + B * H;
  task.sums = workspace.sums;
  task.sum_stride = workspace.sum_stride;
  task.pooled = static_cast<T*>(args.pooled.data);
  int error = round_queries(queue, args.inputs, workspace.query, task.problem);
  if (error) return error;
  const Grid grid{grid_of_groups(task.problem), kPoolThreads, pool_forward_bytes<T>(task.problem.parts.tallest())};
  error = launch(queue, grid, &pool_forward<T>, task);
  if (error || !parts) return error;
  auto finish = finish_of<T, T>(task.problem, task.sums, task.sum_stride, args.pooled.data);
  finish.best = task.best;
  finish.total = task.total;
  finish.statistics = args.statistics;
  return launch_finish<true>(queue, finish);
}

}  // namespace

int64_t attention_pool_forward_workspace(const AttentionPoolForward& args) {
  return with_element(args.inputs.visual.dtype, [&](auto element) {
    return PoolForwardWorkspace<decltype(element)>(args.inputs, nullptr).bytes;
  });
}

int attention_pool_forward(const AttentionPoolForward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return forward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
