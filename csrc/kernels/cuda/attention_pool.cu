// Attention pooling on CUDA. A block of threads takes a part of one sample's tokens: their products with the queries,
// the part of the softmax that is theirs, and the tokens' sums by these weights. Forward is two launches, the blocks
// and their combination in order; backward one more before them, and the last only where the queries need a gradient.
// Where the queries have another dtype than the tokens, they are rounded beforehand, once.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention_pool.h"
#include "kernels/cuda/attention_pool_finish.h"
#include "kernels/cuda/attention_pool_forward.h"
#include "kernels/cuda/attention_pool_prepare.h"
#include "kernels/cuda/launch.h"

namespace petl::cuda {
namespace {

// Blocks that a multiprocessor shall be able to run at once: a bound for the compiler's use of registers.
constexpr int kForwardBlocks = 3, kBackwardBlocks = 2;

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

// Samples are two axes of the grid, since one of them ends at 65535.
dim3 grid_of(int64_t first, int64_t B) {
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

bool rounds_queries(const AttentionPoolInputs& args) { return args.query.dtype != args.visual.dtype; }

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
    const PoolRound<T, Source> task{
        static_cast<const Source*>(args.query.data), args.query.stride, memory, problem.B, problem.H, problem.D};
    return launch(queue, {grid_of(task.H, task.B), kPoolThreads, 0}, &pool_round<T, Source>, task);
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

// Whether parts of samples are to be combined.
template <class T>
bool has_parts(const AttentionPoolInputs& args) {
  return PoolParts::of<T>(args.size.N, args.size.H).count > 1;
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

int64_t attention_pool_forward_workspace(const AttentionPoolForward& args) {
  return with_element(args.inputs.visual.dtype, [&](auto element) {
    return PoolForwardWorkspace<decltype(element)>(args.inputs, nullptr).bytes;
  });
}

int attention_pool_forward(const AttentionPoolForward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return forward<decltype(element)>(args, workspace, queue); });
}

int64_t attention_pool_backward_workspace(const AttentionPoolBackward& args) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return PoolBackwardWorkspace<decltype(element)>(args, nullptr).bytes; });
}

int attention_pool_backward(const AttentionPoolBackward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return backward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
