// Prompt diffusion on CUDA. Forward is one launch; backward is three: the rows' gradients, slabs of the weights'
// gradients, and the sums of the slabs.
#include "kernels/cuda/apt.h"
#include "kernels/cuda/apt_backward.h"
#include "kernels/cuda/apt_finish.h"
#include "kernels/cuda/apt_forward.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {
namespace {

template <class T>
int forward(const AptForward& args, Queue queue) {
  const auto [R, D, P] = args.size;
  AptForwardOp<T> op;
  set_operands(op, args.x, weights_of(args.keys, P, D), weights_of(args.prompts, P, D), R, D, P);
  op.activation = args.activation;
  op.log_scale = args.log_scale.data;
  op.log_scale_dtype = args.log_scale.dtype;
  op.y = static_cast<const T*>(args.y.data);
  op.y_stride = args.y.stride;
  op.out = static_cast<T*>(args.out.data);
  op.gate = args.gate;
  op.scores = static_cast<typename KeptOf<T>::Type*>(args.scores.data);
  op.kept = static_cast<int>(args.size.kept());
  return R > 0 ? launch_sandwich(queue, op) : 0;
}

// What backward keeps between its launches.
template <class T>
struct AptWorkspace {
  int slabs;
  int64_t blocks;
  T* dscores = nullptr;
  T* weighted = nullptr;
  float* sums[2];
  double* shares;
  int64_t bytes;

  AptWorkspace(const AptBackward& args, void* memory) {
    const auto [R, D, P] = args.size;
    const bool of_weights = args.dprompts || args.dkeys;
    Partition partition(memory);
    slabs = R > 0 ? slab_count<T>(R, D, P, 2, false) : 0;
    blocks = blocks_of_rows<T>(R, P);
    shares = partition.take<double>(blocks);
    if (of_weights) {
      dscores = partition.take<T>(R * args.size.kept());
      weighted = partition.take<T>(R * args.size.kept());
    }
    for (float*& part : sums) part = of_weights ? partition.take<float>(slabs * P * D) : nullptr;
    bytes = partition.bytes();
  }
};

template <class T>
int backward_rows(const AptBackward& args, const AptWorkspace<T>& workspace, Queue queue) {
  const auto [R, D, P] = args.size;
  AptBackwardOp<T> op;
  set_operands(op, args.dout, weights_of(args.prompts, P, D), weights_of(args.keys, P, D), R, D, P);
  op.activation = args.activation;
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
  return launch_sandwich(queue, op);
}

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
int backward(const AptBackward& args, void* memory, Queue queue) {
  const AptWorkspace<T> workspace(args, memory);
  const bool of_weights = args.dkeys || args.dprompts;
  int error = 0;
  if (args.size.R > 0) {
    error = backward_rows(args, workspace, queue);
    if (!error && of_weights) error = backward_weights(args, workspace, queue);
  }
  if (error) return error;
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

}  // namespace

int apt_forward(const AptForward& args, Queue queue) {
  return with_element(args.x.dtype, [&](auto element) { return forward<decltype(element)>(args, queue); });
}

int64_t apt_backward_workspace(const AptBackward& args) {
  return with_element(args.x.dtype, [&](auto element) { return AptWorkspace<decltype(element)>(args, nullptr).bytes; });
}

int apt_backward(const AptBackward& args, void* workspace, Queue queue) {
  return with_element(args.x.dtype, [&](auto element) { return backward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
