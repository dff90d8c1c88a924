#include "kernels/cuda/adapter_norm_terms.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {
namespace {

constexpr int kThreads = 256;

struct NormTermsTask {
  AdapterInputs inputs;
  float *mean_weight, *bias;
};

// One block per hidden unit.
__global__ void __launch_bounds__(kThreads) adapter_norm_terms(const __grid_constant__ NormTermsTask task) {
  const AdapterInputs& inputs = task.inputs;
  const ConstRows &down = inputs.down, &norm_weight = inputs.norm_weight, &norm_bias = inputs.norm_bias;
  const int D = static_cast<int>(inputs.size.D);
  const int64_t row = blockIdx.x * down.stride;
  double weighted = 0, biased = 0;
#pragma unroll 2
  for (int column = threadIdx.x; column < D; column += kThreads) {
    const double weight = load_scalar(down.data, down.dtype, row + column);
    weighted += weight * load_scalar(norm_weight.data, norm_weight.dtype, column);
    biased += weight * load_scalar(norm_bias.data, norm_bias.dtype, column);
  }
  double* scratch = reinterpret_cast<double*>(shared_memory());
  weighted = sum_block(weighted, scratch);
  biased = sum_block(biased, scratch);
  if (threadIdx.x > 0) return;
  task.mean_weight[blockIdx.x] = static_cast<float>(weighted / D);
  const ConstRows& down_bias = inputs.down_bias;
  task.bias[blockIdx.x] = static_cast<float>(biased + load_scalar(down_bias.data, down_bias.dtype, blockIdx.x));
}

}  // namespace

int find_norm_terms(Queue queue, const AdapterInputs& inputs, float* mean_weight, float* bias) {
  const dim3 blocks(static_cast<unsigned>(inputs.size.B));
  const NormTermsTask task{inputs, mean_weight, bias};
  return launch(queue, {blocks, kThreads, kThreads / 32 * sizeof(double)}, &adapter_norm_terms, task);
}

}  // namespace petl::cuda
