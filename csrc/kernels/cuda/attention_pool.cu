// Attention pooling on CUDA. A block of threads takes kTokens tokens of one sample: their products with the queries,
// the part of the softmax that is theirs, and the tokens' sums by these weights, for which it reads them again while
// they are in the second-level cache. Forward is two launches, the blocks and their combination in order; backward one
// more before them, and the second only where the queries need a gradient.
#include "kernels/cuda/attention_pool.h"
#include "kernels/cuda/attention_pool_block.h"

namespace petl::cuda {
namespace {

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    pool_forward(const __grid_constant__ PoolForwardTask<T> task) {
  const int splits = task.problem.splits;
  PoolBlock<T, kGroups>(task.problem, blockIdx.x / splits, blockIdx.x % splits).forward(task);
}

template <class T>
struct PoolMeansTask {
  PoolProblem<T> pooled;  // as tokens
  PoolBackwardTask<T> backward;
};

// The first block of each sample finds its means; all blocks of samples with a concentrated head find the rests, and
// for that the means once more: so it is one launch.
template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) pool_means(const __grid_constant__ PoolMeansTask<T> task) {
  const int splits = task.backward.problem.splits, split = blockIdx.x % splits;
  const int64_t sample = blockIdx.x / splits;
  PoolBlock<T, kGroups> pooled(task.pooled, sample, 0);
  const bool has_rests = pooled.has_concentrated_head(task.backward.total);
  if (split > 0 && !has_rests) return;
  pooled.find_means();
  if (split == 0) pooled.store_means(task.backward.mean);
  if (has_rests) PoolBlock<T, kGroups>(task.backward.problem, sample, split).find_rests(task.backward);
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    pool_backward(const __grid_constant__ PoolBackwardTask<T> task) {
  const int splits = task.problem.splits;
  PoolBlock<T, kGroups>(task.problem, blockIdx.x / splits, blockIdx.x % splits).backward(task);
}

// The splits' sums of one head to its row: by their shares of the softmax in forward, as they are in backward.
struct PoolFinish {
  const float* sums;          // [B, splits, H, D]
  const float *best, *total;  // [B, splits, H]; null: the sums count as they are
  int splits, H, D;
  Rows out;           // [B * H, D]
  float* statistics;  // [2, B * H], with best
  int64_t rows;       // B * H
};

// To shares [splits], in shared memory. A split of which no token takes part has minus infinity for its greatest score;
// a sample of such splits becomes NaN.
__device__ __forceinline__ void find_shares(const PoolFinish& task, int64_t row, int64_t first, float* shares) {
  float best = -INFINITY, total = 0;
#pragma unroll 1
  for (int i = 0; i < task.splits; ++i) best = Max()(best, task.best[first + int64_t{i} * task.H]);
#pragma unroll 1
  for (int i = 0; i < task.splits; ++i) {
    const int64_t split = first + int64_t{i} * task.H;
    total += expf(task.best[split] - best) * task.total[split];
  }
  for (int i = threadIdx.x; i < task.splits; i += kThreads) {
    shares[i] = expf(task.best[first + int64_t{i} * task.H] - best) / total;
  }
  if (threadIdx.x == 0) {
    task.statistics[row] = best;
    task.statistics[task.rows + row] = total;
  }
}

template <class T>
__device__ __forceinline__ void store_as(T, const Rows& rows, int64_t index, const float (&values)[8]) {
  store(static_cast<T*>(rows.data) + index, pack<T>(values));
}

__global__ void __launch_bounds__(kThreads) pool_finish(const __grid_constant__ PoolFinish task) {
  float* const shares = reinterpret_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x, first = row / task.H * task.splits * task.H + row % task.H;
  if (task.best) find_shares(task, row, first, shares);
  __syncthreads();
  for (int column = threadIdx.x * 8; column < task.D; column += kThreads * 8) {
    float values[8] = {};
#pragma unroll 1
    for (int split = 0; split < task.splits; ++split) {
      const float share = task.best ? shares[split] : 1;
      float part[8];
      unpack(load(task.sums + (first + int64_t{split} * task.H) * task.D + column), part);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = fmaf(share, part[i], values[i]);
    }
    const int64_t index = row * task.D + column;
    if (task.out.dtype == DType::bfloat16) {
      store_as(Bfloat16{}, task.out, index, values);
    } else if (task.out.dtype == DType::float16) {
      store_as(Float16{}, task.out, index, values);
    } else {
      store_as(float{}, task.out, index, values);
    }
  }
}

int launch_finish(Queue queue, const PoolFinish& task) {
  const int shared = static_cast<int>(task.splits * sizeof(float));
  return launch(queue, {dim3(static_cast<unsigned>(task.rows)), kThreads, shared}, &pool_finish, task);
}

template <class T>
PoolProblem<T> problem_of(const AttentionPoolInputs& args) {
  const auto [B, N, D, H] = args.size;
  PoolProblem<T> problem = {};
  problem.visual = static_cast<const T*>(args.visual.data);
  problem.visual_sample = args.visual_sample;
  problem.visual_stride = args.visual.stride;
  problem.mask = args.mask;
  problem.query = weights_of(args.query, H, D);
  problem.scale = args.scale;
  problem.N = static_cast<int>(N);
  problem.D = static_cast<int>(D);
  problem.H = static_cast<int>(H);
  problem.splits = static_cast<int>(divide_up(N, kTokens));
  return problem;
}

// Of the sums of all splits, as they are.
PoolFinish finish_of(const AttentionPoolInputs& args, const float* sums) {
  const auto [B, N, D, H] = args.size;
  PoolFinish finish = {};
  finish.sums = sums;
  finish.splits = static_cast<int>(divide_up(N, kTokens));
  finish.H = static_cast<int>(H);
  finish.D = static_cast<int>(D);
  finish.rows = B * H;
  return finish;
}

struct PoolForwardWorkspace {
  float *sums, *best, *total;
  int64_t bytes;

  PoolForwardWorkspace(const AttentionPoolSizes& size, void* memory) {
    Partition partition(memory);
    const int64_t rows = size.B * divide_up(size.N, kTokens) * size.H;
    sums = partition.take<float>(rows * size.D);
    best = partition.take<float>(rows);
    total = partition.take<float>(rows);
    bytes = partition.bytes();
  }
};

struct PoolBackwardWorkspace {
  float *sums, *mean, *rests;
  int64_t bytes;

  PoolBackwardWorkspace(const AttentionPoolBackward& args, void* memory) {
    Partition partition(memory);
    const auto [B, N, D, H] = args.inputs.size;
    const int64_t splits = divide_up(N, kTokens);
    sums = args.dquery ? partition.take<float>(B * splits * H * D) : nullptr;
    mean = partition.take<float>(B * H);
    rests = partition.take<float>(B * splits * H);
    bytes = partition.bytes();
  }
};

template <class T, int kGroups>
int launch_forward(Queue queue, const PoolForwardTask<T>& task, unsigned blocks) {
  return launch(queue, {dim3(blocks), kThreads, PoolBlock<T, kGroups>::kForwardBytes}, &pool_forward<T, kGroups>, task);
}

template <class T, int kGroups>
int launch_backward(Queue queue, const PoolMeansTask<T>& means, unsigned blocks) {
  using Block = PoolBlock<T, kGroups>;
  const int error = launch(queue, {dim3(blocks), kThreads, Block::kMeansBytes}, &pool_means<T, kGroups>, means);
  if (error) return error;
  return launch(queue, {dim3(blocks), kThreads, Block::kBackwardBytes}, &pool_backward<T, kGroups>, means.backward);
}

template <class T>
int forward(const AttentionPoolForward& args, void* memory, Queue queue) {
  const auto [B, N, D, H] = args.inputs.size;
  if (B == 0) return 0;
  const PoolForwardWorkspace workspace(args.inputs.size, memory);
  const PoolForwardTask<T> task{problem_of<T>(args.inputs), workspace.sums, workspace.best, workspace.total};
  const unsigned blocks = static_cast<unsigned>(B * task.problem.splits);
  const int error = H <= 32 ? launch_forward<T, 1>(queue, task, blocks) : launch_forward<T, 2>(queue, task, blocks);
  if (error) return error;
  PoolFinish finish = finish_of(args.inputs, workspace.sums);
  finish.best = workspace.best;
  finish.total = workspace.total;
  finish.out = args.pooled;
  finish.statistics = args.statistics;
  return launch_finish(queue, finish);
}

template <class T>
int backward(const AttentionPoolBackward& args, void* memory, Queue queue) {
  const auto [B, N, D, H] = args.inputs.size;
  if (B == 0) return 0;
  const PoolBackwardWorkspace workspace(args, memory);
  const int64_t rows = B * H;
  const Weights dpooled = weights_of(args.dpooled, H, D);
  PoolBackwardTask<T> task = {};
  task.problem = problem_of<T>(args.inputs);
  task.dpooled = dpooled;
  task.best = args.statistics;
  task.total = args.statistics + rows;
  task.mean = workspace.mean;
  task.rests = workspace.rests;
  task.dvisual = static_cast<T*>(args.dvisual.data);
  task.sums = workspace.sums;
  PoolMeansTask<T> means{task.problem, task};
  means.pooled.visual = static_cast<const T*>(args.pooled.data);
  means.pooled.visual_sample = H * args.pooled.stride;
  means.pooled.visual_stride = args.pooled.stride;
  means.pooled.mask = nullptr;
  means.pooled.query = dpooled;
  means.pooled.N = static_cast<int>(H);
  means.pooled.splits = 1;
  const unsigned blocks = static_cast<unsigned>(B * task.problem.splits);
  const int error = H <= 32 ? launch_backward<T, 1>(queue, means, blocks) : launch_backward<T, 2>(queue, means, blocks);
  if (error || !args.dquery) return error;
  PoolFinish finish = finish_of(args.inputs, workspace.sums);
  finish.out = {args.dquery, DType::float32};
  return launch_finish(queue, finish);
}

}  // namespace

int64_t attention_pool_forward_workspace(const AttentionPoolForward& args) {
  return PoolForwardWorkspace(args.inputs.size, nullptr).bytes;
}

int attention_pool_forward(const AttentionPoolForward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return forward<decltype(element)>(args, workspace, queue); });
}

int64_t attention_pool_backward_workspace(const AttentionPoolBackward& args) {
  return PoolBackwardWorkspace(args, nullptr).bytes;
}

int attention_pool_backward(const AttentionPoolBackward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return backward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
