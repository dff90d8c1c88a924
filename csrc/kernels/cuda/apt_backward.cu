// Prompt diffusion's backward on CUDA, in four launches: the packed weights, the rows' gradients, slabs of the weights'
// gradients, and the sums of the slabs.
#include "kernels/cuda/apt.h"
#include "kernels/cuda/apt_backward.h"
#include "kernels/cuda/apt_finish.h"
#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/apt_passes.h"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {
namespace {

// What backward keeps between its launches.
template <class T>
struct AptWorkspace {
  int slabs;
  T* dscores = nullptr;
  T* weighted = nullptr;
  float* sums[2];
  int64_t blocks;
  double* shares;

  AptWorkspace(const AptBackward& args, int64_t blocks, Partition& partition) : blocks(blocks) {
    const auto [R, D, P] = args.size;
    const bool of_weights = args.dprompts || args.dkeys;
    slabs = R > 0 ? slab_count<T>(R, D, P, 2, false) : 0;
    shares = partition.take<double>(blocks);
    if (of_weights) {
      dscores = partition.take<T>(R * args.size.kept());
      weighted = partition.take<T>(R * args.size.kept());
    }
    for (float*& part : sums) part = of_weights ? partition.take<float>(slabs * P * D) : nullptr;
  }
};

template <class T>
int backward_weights(const AptBackward& args, const AptWorkspace<T>& workspace, Queue queue) {
  const auto [R, D, P] = args.size;
  const int64_t kept = args.size.kept();
  GradientTask<T> task = {};
  task.R = R;
  task.D = static_cast<int>(D);
  task.inner = static_cast<int>(P);
  task.slabs = workspace.slabs;
  GradientProblem<T> of_keys = {}, of_prompts = {};
  of_keys.left = workspace.dscores;
  of_keys.left_stride = kept;
  of_keys.right = static_cast<const T*>(args.x.data);
  of_keys.right_stride = args.x.stride;
  of_keys.sums = workspace.sums[0];
  of_prompts.left = workspace.weighted;
  of_prompts.left_stride = kept;
  of_prompts.right = static_cast<const T*>(args.dout.data);
  of_prompts.right_stride = args.dout.stride;
  of_prompts.sums = workspace.sums[1];
  if (args.dkeys) task.problems[task.problem_count++] = of_keys;
  if (args.dprompts) task.problems[task.problem_count++] = of_prompts;
  return launch_gradients(queue, task);
}

template <class T>
int finish(const AptBackward& args, const AptWorkspace<T>& workspace, Queue queue) {
  AptFinish task = {};
  task.sums[0] = workspace.sums[0];
  task.sums[1] = workspace.sums[1];
  task.targets[0] = args.dkeys;
  task.targets[1] = args.dprompts;
  task.slabs = workspace.slabs;
  task.count = args.size.P * args.size.D;
  task.shares = workspace.shares;
  task.blocks = workspace.blocks;
  task.dlog_scale = args.dlog_scale;
  return finish_apt(queue, task);
}

template <class T, class Shape>
struct AptBackwardPass {
  using Layout = SandwichLayout<Shape, false>;

  const AptBackward& args;
  Partition partition;
  AptPacking<T, Layout, Shape> packing;
  AptWorkspace<T> workspace;

  AptBackwardPass(const AptBackward& args, void* memory)
      : args(args),
        partition(memory),
        packing(args.size, args.prompts, args.keys, partition),
        workspace(args, blocks_of_rows<Shape>(args.size.R), partition) {}

  int run(Queue queue) const {
    int error = args.size.R > 0 ? launch_packing<T>(queue, packing.task) : 0;
    if (!error && args.size.R > 0) error = rows(queue);
    if (!error && args.size.R > 0 && (args.dkeys || args.dprompts)) error = backward_weights(args, workspace, queue);
    return error ? error : finish(args, workspace, queue);
  }

 private:
  int rows(Queue queue) const {
    AptBackwardOp<T> op;
    set_operands(op, args.dout, packing.first, packing.second, args.size.R, args.size.D, args.size.P);
    op.activation = args.activation;
    op.dropout = args.dropout;
    op.log_scale = args.log_scale.data;
    op.log_scale_dtype = args.log_scale.dtype;
    op.y = args.dlog_scale ? static_cast<const T*>(args.y.data) : nullptr;
    op.y_stride = args.y.stride;
    op.gate = args.gate;
    op.scores = static_cast<const typename KeptOf<T>::Type*>(args.scores.data);
    op.kept = static_cast<int>(args.size.kept());
    op.dx = static_cast<T*>(args.dx.data);
    op.dy = static_cast<T*>(args.dy.data);
    op.dscores = workspace.dscores;
    op.weighted = workspace.weighted;
    op.shares = workspace.shares;
    return launch_sandwich<Shape>(queue, op);
  }
};

// The same with the rows by the Hopper path.
template <class T>
struct AptHopperBackwardPass {
  const AptBackward& args;
  Partition partition;
  void* packed;
  AptWorkspace<T> workspace;

  AptHopperBackwardPass(const AptBackward& args, void* memory)
      : args(args),
        partition(memory),
        packed(partition.take<char>(apt_hopper_backward_bytes(args))),
        workspace(args, apt_hopper_shares(args), partition) {}

  int run(Queue queue) const {
    const AptHopperKept kept{packed, workspace.dscores, workspace.weighted, workspace.shares};
    int error = apt_hopper_backward_rows(args, kept, queue);
    if (!error && (args.dkeys || args.dprompts)) error = backward_weights(args, workspace, queue);
    return error ? error : finish(args, workspace, queue);
  }
};

bool runs_on_hopper(const AptBackward& args) {
  const auto [R, D, P] = args.size;
  return !args.dropout.seeds && hopper_runs(R, D, P, args.dout, {});
}

template <class Function>
auto with_hopper_backward(const AptBackward& args, void* memory, const Function& function) {
  return with_half(args.x.dtype,
                   [&](auto element) { return function(AptHopperBackwardPass<decltype(element)>(args, memory)); });
}

template <class Function>
auto with_backward(const AptBackward& args, void* memory, const Function& function) {
  return with_element(args.x.dtype, [&](auto element) {
    using T = decltype(element);
    return with_shape<T>(args.size.P,
                         [&](auto shape) { return function(AptBackwardPass<T, decltype(shape)>(args, memory)); });
  });
}

}  // namespace

int64_t apt_hopper_workspace(const AptBackward& args) {
  return with_hopper_backward(args, nullptr, [](const auto& pass) { return pass.partition.bytes(); });
}

int apt_hopper_backward(const AptBackward& args, void* workspace, Queue queue) {
  return with_hopper_backward(args, workspace, [&](const auto& pass) { return pass.run(queue); });
}

int64_t apt_backward_workspace(const AptBackward& args) {
  if (runs_on_hopper(args)) return apt_hopper_workspace(args);
  return with_backward(args, nullptr, [](const auto& pass) { return pass.partition.bytes(); });
}

int apt_backward(const AptBackward& args, void* workspace, Queue queue) {
  if (args.size.R > 0 && hopper_choice() == HopperChoice::unknown) return kUnknownHopperChoice;
  if (runs_on_hopper(args)) return apt_hopper_backward(args, workspace, queue);
  return with_backward(args, workspace, [&](const auto& pass) { return pass.run(queue); });
}

}  // namespace petl::cuda
