// The adapter's backward on CUDA: packs the weights, computes the first product anew, and then the rows' gradients,
// slabs of the weights' gradients, and from their sums the gradients of the parameters.
#include "kernels/cuda/adapter.h"
#include "kernels/cuda/adapter_backward.h"
#include "kernels/cuda/adapter_finish.h"
#include "kernels/cuda/adapter_hopper.h"
#include "kernels/cuda/adapter_passes.h"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {
namespace {

int64_t kept_width(const AdapterSizes& size) { return round_up(size.B, kVectorWidth); }

// What backward keeps between its launches.
template <class T>
struct AdapterWorkspace {
  int slabs;
  int64_t blocks;
  RowStatistics* statistics;
  float* products = nullptr;
  double* shares = nullptr;
  T* hidden = nullptr;
  T* dhidden = nullptr;
  float* sums[2] = {};
  float* dhidden_sums = nullptr;
  float* dout_sums = nullptr;

  // Of the rows' blocks, or whatever has a share of dgain.
  AdapterWorkspace(const AdapterBackward& args, int64_t blocks, bool keeps_products, Partition& partition)
      : blocks(blocks) {
    const auto [R, D, B] = args.inputs.size;
    const int64_t kept = kept_width(args.inputs.size);
    slabs = R > 0 ? slab_count<T>(R, D, B, 2, true) : 0;
    statistics = partition.take<RowStatistics>(R);
    if (keeps_products) products = partition.take<float>(R * kept);
    if (args.dgain) shares = partition.take<double>(blocks);
    if (args.ddown) {
      hidden = partition.take<T>(R * kept);
      dhidden = partition.take<T>(R * kept);
      // One slab even without rows: the sums, which are zero then, lie in it.
      for (float*& part : sums) part = partition.take<float>((slabs > 0 ? slabs : 1) * B * D);
      dhidden_sums = partition.take<float>(slabs * B);
      dout_sums = partition.take<float>(slabs * D);
    }
  }
};

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

template <class T, class Shape>
struct AdapterBackwardPass {
  using Layout = SandwichLayout<Shape, false>;

  const AdapterBackward& args;
  Partition partition;
  AdapterPacking<T, Layout, Shape> packing;
  const T *up, *down;  // of the products with dout and dhidden
  AdapterWorkspace<T> workspace;

  AdapterBackwardPass(const AdapterBackward& args, void* memory)
      : args(args),
        partition(memory),
        packing(args.inputs, partition),
        workspace(args, blocks_of_rows<Shape>(args.inputs.size.R), true, partition) {
    const auto [R, D, B] = args.inputs.size;
    PackedOperand* const operands = packing.task.operands;
    operands[1] = first_operand<Layout>(weights_of(args.inputs.up, D, B), Order::depth, D, B);
    operands[2] = second_operand<Layout, Shape>(weights_of(args.inputs.down, B, D), Order::depth, D, B);
    up = place_operand<T>(operands[1], partition);
    down = place_operand<T>(operands[2], partition);
  }

  int run(Queue queue) const {
    int error = 0;
    if (args.inputs.size.R > 0) {
      error = launch_packing<T>(queue, packing.task);
      if (!error) error = products(queue);
      if (!error) error = rows(queue);
      if (!error && args.ddown) error = backward_weights(args, workspace, queue);
    }
    return error ? error : finish(args, workspace, queue);
  }

 private:
  int products(Queue queue) const {
    AdapterProductsOp<T> op = {};
    set_first<T>(op, args.inputs, packing.down, nullptr, packing.vectors);
    op.products = workspace.products;
    op.statistics = workspace.statistics;
    op.kept = static_cast<int>(kept_width(args.inputs.size));
    return launch_sandwich<Shape>(queue, op);
  }

  int rows(Queue queue) const {
    const AdapterInputs& inputs = args.inputs;
    AdapterBackwardOp<T> op = {};
    set_operands(op, args.dout, up, down, inputs.size.R, inputs.size.D, inputs.size.B);
    op.activation = inputs.activation;
    op.dropout = inputs.dropout;
    op.vectors = packing.vectors;
    op.scale = scale_of(inputs);
    op.x = inputs.norm_weight.data ? static_cast<const T*>(inputs.x.data) : nullptr;
    op.x_stride = inputs.x.stride;
    op.statistics = workspace.statistics;
    op.residual_is_input = args.residual_is_input;
    op.dx = static_cast<T*>(args.dx.data);
    op.products = workspace.products;
    op.hidden = workspace.hidden;
    op.dhidden = workspace.dhidden;
    op.kept = static_cast<int>(kept_width(inputs.size));
    op.shares = workspace.shares;
    return launch_sandwich<Shape>(queue, op);
  }
};

// The same with the rows, and the first product again, by the Hopper path.
template <class T>
struct AdapterHopperBackwardPass {
  const AdapterBackward& args;
  Partition partition;
  void* room;
  AdapterWorkspace<T> workspace;

  AdapterHopperBackwardPass(const AdapterBackward& args, void* memory)
      : args(args),
        partition(memory),
        room(partition.take<char>(adapter_hopper_backward_bytes(args))),
        workspace(args, adapter_hopper_shares(args), false, partition) {}

  int run(Queue queue) const {
    const AdapterHopperKept kept{room, workspace.statistics, workspace.hidden, workspace.dhidden, workspace.shares};
    int error = adapter_hopper_backward_rows(args, kept, queue);
    if (!error && args.ddown) error = backward_weights(args, workspace, queue);
    return error ? error : finish(args, workspace, queue);
  }
};

bool runs_on_hopper(const AdapterBackward& args) {
  const auto [R, D, B] = args.inputs.size;
  return !args.inputs.dropout.seeds && hopper_runs(R, D, B, args.inputs.x, args.dout);
}

template <class Function>
auto with_hopper_pass(const AdapterBackward& args, void* memory, const Function& function) {
  return with_half(args.inputs.x.dtype,
                   [&](auto element) { return function(AdapterHopperBackwardPass<decltype(element)>(args, memory)); });
}

// Calls function with the pass of a call.
template <class Function>
auto with_pass(const AdapterBackward& args, void* memory, const Function& function) {
  return with_element(args.inputs.x.dtype, [&](auto element) {
    using T = decltype(element);
    return with_shape<T>(args.inputs.size.B,
                         [&](auto shape) { return function(AdapterBackwardPass<T, decltype(shape)>(args, memory)); });
  });
}

}  // namespace

int64_t adapter_hopper_workspace(const AdapterBackward& args) {
  return with_hopper_pass(args, nullptr, [](const auto& pass) { return pass.partition.bytes(); });
}

int adapter_hopper_backward(const AdapterBackward& args, void* workspace, Queue queue) {
  return with_hopper_pass(args, workspace, [&](const auto& pass) { return pass.run(queue); });
}

int64_t adapter_backward_workspace(const AdapterBackward& args) {
  if (runs_on_hopper(args)) return adapter_hopper_workspace(args);
  return with_pass(args, nullptr, [](const auto& pass) { return pass.partition.bytes(); });
}

int adapter_backward(const AdapterBackward& args, void* workspace, Queue queue) {
  if (args.inputs.size.R > 0 && hopper_choice() == HopperChoice::unknown) return kUnknownHopperChoice;
  if (runs_on_hopper(args)) return adapter_hopper_backward(args, workspace, queue);
  return with_pass(args, workspace, [&](const auto& pass) { return pass.run(queue); });
}

}  // namespace petl::cuda
