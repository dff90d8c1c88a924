#include "kernels/cuda/apt_finish.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/slab_sums.h"

namespace petl::cuda {
namespace {

// A thread adds four neighboring elements of all slabs. Small blocks, so that few elements too are spread over a GPU.
constexpr int kThreads = 128, kElements = 4 * kThreads;

// The last block adds up dlog_scale, if that is wanted; the others have each kElements of one target.
__global__ void __launch_bounds__(kThreads) apt_finish(const __grid_constant__ AptFinish task) {
  const int64_t blocks_per_target = (task.count + kElements - 1) / kElements;
  if (task.dlog_scale && blockIdx.x == gridDim.x - 1) {
    double share = 0;
    for (int64_t block = threadIdx.x; block < task.blocks; block += kThreads) share += task.shares[block];
    share = sum_block(share, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) *task.dlog_scale = static_cast<float>(share);
    return;
  }
  const int problem = blockIdx.x >= blocks_per_target;
  const int64_t index = (blockIdx.x - problem * blocks_per_target) * kElements + 4 * threadIdx.x;
  if (!task.targets[problem] || index >= task.count) return;
  const float4 sum = add_slabs<float4>(task.sums[problem] + index, task.slabs, task.count);
  *reinterpret_cast<float4*>(task.targets[problem] + index) = sum;
}

}  // namespace

int finish_apt(Queue queue, const AptFinish& task) {
  const bool has_weights = task.targets[0] || task.targets[1];
  const int64_t blocks = (has_weights ? 2 * divide_up(task.count, kElements) : 0) + (task.dlog_scale ? 1 : 0);
  if (blocks == 0) return 0;
  const dim3 grid(static_cast<unsigned>(blocks));
  return launch(queue, {grid, kThreads, kThreads / 32 * sizeof(double)}, &apt_finish, task);
}

}  // namespace petl::cuda
