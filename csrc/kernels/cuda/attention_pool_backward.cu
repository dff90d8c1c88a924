// Attention pooling on CUDA, backward. What blocks have to know of a sample beforehand is one launch; then a block of
// threads takes a part of one sample's tokens, and finds their gradients and their share of the queries'. Where there
// are several parts, the shares are combined by a third launch. Queries are as in forward.
#include "kernels/cuda/attention_pool.h"
#include "kernels/cuda/attention_pool_launch.h"
#include "kernels/cuda/attention_pool_prepare.h"

namespace petl::cuda {
namespace {

// Blocks that a multiprocessor shall be able to run at once: a bound for the compiler's use of registers.
constexpr int kBackwardBlocks = 2;

template <class T>
__global__ void __launch_bounds__(kPoolThreads, kBackwardBlocks)
    pool_prepare(const __grid_constant__ PoolBackwardTask<T> task) {
  const PoolPlace<T> place = PoolPlace<T>::of_group(task.problem);
  if (place.exists()) PoolPrepare<T>::run(task, place);
}

template <class T, bool kOneGroup>
__global__ void __launch_bounds__(kPoolThreads, kBackwardBlocks)
    pool_backward(const __grid_constant__ PoolBackwardTask<T> task) {
  const PoolPlace<T> place = PoolPlace<T>::of_all_groups(task.problem);
  if (!place.exists()) return;
  const int blocks = task.problem.parts.blocks_of(place.part);
  with_height<kMostTokenBlocks<T, kOneGroup>>(
      blocks, [&](auto blocks) { PoolBackward<T, decltype(blocks)::value, kOneGroup>::run(task, place); });
}

template <class T>
struct PoolBackwardWorkspace {
  int64_t sum_stride, operand_stride;
  T *query = nullptr, *operands = nullptr;
  float *sums = nullptr, *mean, *rests;
  int64_t bytes;

  PoolBackwardWorkspace(const AttentionPoolBackward& args, void* memory) {
    Partition partition(memory);
    const auto [B, N, D, H] = args.inputs.size;
    const int64_t rows = B * PoolParts::of<T>(N, H).count * H;
    sum_stride = operand_stride = rounded_width<T>(D);
    if (rounds_queries(args.inputs)) query = partition.take<T>(B * H * D);
    if (args.dvisual.data) operands = partition.take<T>(B * pool_groups(H) * 2 * kHeadGroup * operand_stride);
    if (args.dquery && has_parts<T>(args.inputs)) sums = partition.take<float>(rows * sum_stride);
    mean = partition.take<float>(B * H);
    rests = partition.take<float>(rows);
    bytes = partition.bytes();
  }
};

template <class T>
PoolBackwardTask<T> task_of(const AttentionPoolBackward& args, const PoolBackwardWorkspace<T>& workspace) {
  const auto [B, N, D, H] = args.inputs.size;
  PoolBackwardTask<T> task = {};
  task.problem = problem_of<T>(args.inputs);
  task.dpooled = static_cast<const T*>(args.dpooled.data);
  task.dpooled_stride = args.dpooled.stride;
  task.pooled = static_cast<const T*>(args.pooled.data);
  task.pooled_stride = args.pooled.stride;
  task.best = args.statistics;
  task.total = args.statistics + B * H;
  task.mean = workspace.mean;
  task.rests = workspace.rests;
  task.operands = workspace.operands;
  task.operand_stride = workspace.operand_stride;
  task.dvisual = static_cast<T*>(args.dvisual.data);
  task.sums = workspace.sums;
  task.sum_stride = workspace.sum_stride;
  task.dquery = args.dquery;
  return task;
}

template <class T>
int backward(const AttentionPoolBackward& args, void* memory, Queue queue) {
  const auto [B, N, D, H] = args.inputs.size;
  if (B == 0) return 0;
  const PoolBackwardWorkspace<T> workspace(args, memory);
  PoolBackwardTask<T> task = task_of<T>(args, workspace);
  int error = round_queries(queue, args.inputs, workspace.query, task.problem);
  if (error) return error;
  const Grid prepare{grid_of_groups(task.problem), kPoolThreads, PoolPrepare<T>::kSharedBytes};
  error = launch(queue, prepare, &pool_prepare<T>, task);
  if (error) return error;
  const Grid grid{grid_of(task.problem.parts.count, B), kPoolThreads,
                  pool_backward_bytes<T>(task.problem.parts.tallest(), H)};
  error = launch(queue, grid, H <= kHeadGroup ? &pool_backward<T, true> : &pool_backward<T, false>, task);
  if (error || !task.sums) return error;
  return launch_finish<false>(queue, finish_of<T, float>(task.problem, task.sums, task.sum_stride, args.dquery));
}

}  // namespace

int64_t attention_pool_backward_workspace(const AttentionPoolBackward& args) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return PoolBackwardWorkspace<decltype(element)>(args, nullptr).bytes; });
}

int attention_pool_backward(const AttentionPoolBackward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return backward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
