// The bottleneck adapter on CUDA. Forward is one launch. Backward computes the first product anew, and
// then the rows' gradients, slabs of the weights' gradients, and from their sums the gradients of the parameters.
#include "kernels/cuda/adapter.h"
#include "kernels/cuda/adapter_backward.h"
#include "kernels/cuda/adapter_finish.h"
#include "kernels/cuda/adapter_forward.h"
#include "kernels/cuda/adapter_norm_terms.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {
namespace {

Norm norm_of(const AdapterInputs& inputs) {
  return {weights_of(inputs.norm_weight, 1, inputs.size.D), weights_of(inputs.norm_bias, 1, inputs.size.D),
          inputs.epsilon};
}

Scale scale_of(const AdapterInputs& inputs) { return {inputs.scale, inputs.gain.data, inputs.gain.dtype}; }

int64_t kept_width(const AdapterSizes& size) { return round_up(size.B, kVectorWidth); }

// Computes the hidden units; the caller adds where they or the output go.
template <class T>
AdapterForwardOp<T> forward_op(const AdapterInputs& inputs) {
  const auto [R, D, B] = inputs.size;
  AdapterForwardOp<T> op = {};
  set_operands(op, inputs.x, weights_of(inputs.down, B, D), weights_of(inputs.up, D, B), R, D, B);
  op.activation = inputs.activation;
  op.norm = norm_of(inputs);
  op.down_bias = weights_of(inputs.down_bias, 1, B);
  op.up_bias = weights_of(inputs.up_bias, 1, D);
  op.scale = scale_of(inputs);
  op.kept = static_cast<int>(kept_width(inputs.size));
  return op;
}

template <class T>
int forward(const AdapterForward& args, Queue queue) {
  AdapterForwardOp<T> op = forward_op<T>(args.inputs);
  op.residual = static_cast<const T*>(args.residual.data);
  op.residual_stride = args.residual.stride;
  op.out = static_cast<T*>(args.out.data);
  return op.R > 0 ? launch_sandwich(queue, op) : 0;
}

// What backward keeps between its launches.
template <class T>
struct AdapterWorkspace {
  int slabs;
  int64_t blocks;
  RowStatistics* statistics;
  float* hidden_products;
  NormTerms norm_terms;
  double* shares = nullptr;
  T* hidden = nullptr;
  T* dhidden = nullptr;
  float* sums[2] = {};
  float* dhidden_sums = nullptr;
  float* dout_sums = nullptr;
  int64_t bytes;

  AdapterWorkspace(const AdapterBackward& args, void* memory) {
    const auto [R, D, B] = args.inputs.size;
    const int64_t kept = kept_width(args.inputs.size);
    Partition partition(memory);
    slabs = R > 0 ? slab_count<T>(R, D, B, 2, true) : 0;
    blocks = blocks_of_rows<T>(R, B);
    statistics = partition.take<RowStatistics>(R);
    hidden_products = partition.take<float>(R * kept);
    norm_terms = {partition.take<float>(B), partition.take<float>(B)};
    if (args.dgain) shares = partition.take<double>(blocks);
    if (args.ddown) {
      hidden = partition.take<T>(R * kept);
      dhidden = partition.take<T>(R * kept);
      for (float*& part : sums) part = partition.take<float>(slabs * B * D);
      dhidden_sums = partition.take<float>(slabs * B);
      dout_sums = partition.take<float>(slabs * D);
    }
    bytes = partition.bytes();
  }
};

template <class T>
int backward_products(const AdapterBackward& args, const AdapterWorkspace<T>& workspace, Queue queue) {
  AdapterForwardOp<T> op = forward_op<T>(args.inputs);
  op.hidden_products = workspace.hidden_products;
  op.statistics = workspace.statistics;
  if (op.norm.exists()) {
    const NormTerms& terms = workspace.norm_terms;
    const int error = find_norm_terms(queue, args.inputs, terms.mean_weight, terms.bias);
    if (error) return error;
    op.norm.bias = {};  // of no elements: it is loaded as zeros
  }
  return launch_sandwich(queue, op);
}

template <class T>
int backward_rows(const AdapterBackward& args, const AdapterWorkspace<T>& workspace, Queue queue) {
  const AdapterInputs& inputs = args.inputs;
  const auto [R, D, B] = inputs.size;
  AdapterBackwardOp<T> op = {};
  set_operands(op, args.dout, weights_of(inputs.up, D, B), weights_of(inputs.down, B, D), R, D, B);
  op.activation = inputs.activation;
  op.norm = norm_of(inputs);
  op.mean_weight = workspace.norm_terms.mean_weight;
  op.up_bias = weights_of(inputs.up_bias, 1, D);
  op.scale = scale_of(inputs);
  op.x = static_cast<const T*>(inputs.x.data);
  op.x_stride = inputs.x.stride;
  op.statistics = workspace.statistics;
  op.residual_is_input = args.residual_is_input;
  op.dx = static_cast<T*>(args.dx.data);
  op.hidden_products = workspace.hidden_products;
  const ConstRows both_biases{workspace.norm_terms.bias, B, DType::float32};
  op.hidden_bias = weights_of(op.norm.exists() ? both_biases : inputs.down_bias, 1, B);
  op.hidden = workspace.hidden;
  op.dhidden = workspace.dhidden;
  op.kept = static_cast<int>(kept_width(inputs.size));
  op.shares = workspace.shares;
  return launch_sandwich(queue, op);
}

template <class T>
int backward_weights(const AdapterBackward& args, const AdapterWorkspace<T>& workspace, Queue queue) {
  const AdapterInputs& inputs = args.inputs;
  const auto [R, D, B] = inputs.size;
  const int64_t kept = kept_width(inputs.size);
  GradientTask<T> task = {};
  task.R = R;
  task.D = static_cast<int>(D);
  task.inner = static_cast<int>(B);
  task.slabs = workspace.slabs;
  task.problem_count = 2;
  GradientProblem<T>& of_down = task.problems[0];
  of_down.left = workspace.dhidden;
  of_down.left_stride = kept;
  of_down.right = static_cast<const T*>(inputs.x.data);
  of_down.right_stride = inputs.x.stride;
  of_down.statistics = inputs.norm_weight.data ? workspace.statistics : nullptr;
  of_down.sums = workspace.sums[0];
  of_down.left_sums = workspace.dhidden_sums;
  GradientProblem<T>& of_up = task.problems[1];
  of_up.left = workspace.hidden;
  of_up.left_stride = kept;
  of_up.right = static_cast<const T*>(args.dout.data);
  of_up.right_stride = args.dout.stride;
  of_up.sums = workspace.sums[1];
  of_up.right_sums = workspace.dout_sums;
  return launch_gradients(queue, task);
}

template <class T>
int finish(const AdapterBackward& args, const AdapterWorkspace<T>& workspace, Queue queue) {
  AdapterSums sums;
  sums.down = workspace.sums[0];
  sums.up = workspace.sums[1];
  sums.dhidden = workspace.dhidden_sums;
  sums.dout = workspace.dout_sums;
  sums.slabs = workspace.slabs;
  sums.shares = workspace.shares;
  sums.blocks = workspace.blocks;
  return finish_adapter(queue, args, sums);
}

template <class T>
int backward(const AdapterBackward& args, void* memory, Queue queue) {
  const AdapterWorkspace<T> workspace(args, memory);
  int error = 0;
  if (args.inputs.size.R > 0) {
    error = backward_products(args, workspace, queue);
    if (!error) error = backward_rows(args, workspace, queue);
    if (!error && args.ddown) error = backward_weights(args, workspace, queue);
  }
  return error ? error : finish(args, workspace, queue);
}

}  // namespace

int adapter_forward(const AdapterForward& args, Queue queue) {
  return with_element(args.inputs.x.dtype, [&](auto element) { return forward<decltype(element)>(args, queue); });
}

int64_t adapter_backward_workspace(const AdapterBackward& args) {
  return with_element(args.inputs.x.dtype,
                      [&](auto element) { return AdapterWorkspace<decltype(element)>(args, nullptr).bytes; });
}

int adapter_backward(const AdapterBackward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.x.dtype,
                      [&](auto element) { return backward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
