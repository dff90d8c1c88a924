// Prompt diffusion on CUDA. Forward is two launches, of which the first packs the weights, or three where rows are few;
// backward is four: the same, the rows' gradients, slabs of the weights' gradients, and the sums of the slabs.
#include "kernels/cuda/apt.h"
#include "kernels/cuda/apt_backward.h"
#include "kernels/cuda/apt_few_rows.h"
#include "kernels/cuda/apt_finish.h"
#include "kernels/cuda/apt_forward.h"
#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {
namespace {

// The weights of a pass, packed: `first` [P, D] meets left's rows, `second` [P, D] the hidden units.
template <class T, class Layout, class Shape>
struct AptPacking {
  PackTask<NoRows> task = {};
  const T *first, *second;

  AptPacking(const AptSizes& size, const ConstRows& first_rows, const ConstRows& second_rows, Partition& partition) {
    const auto [R, D, P] = size;
    task.operands[0] = first_operand<Layout>(weights_of(first_rows, P, D), Order::columns, D, P);
    task.operands[1] = second_operand<Layout, Shape>(weights_of(second_rows, P, D), Order::depth, D, P);
    first = place_operand<T>(task.operands[0], partition);
    second = place_operand<T>(task.operands[1], partition);
  }
};

template <class T, class Shape, bool kRest>
struct AptForwardPass {
  using Layout = SandwichLayout<Shape, kRest>;

  const AptForward& args;
  Partition packed, workspace;
  AptPacking<T, Layout, Shape> packing;
  FewRows few;

  AptForwardPass(const AptForward& args, void* packed_memory, void* memory)
      : args(args),
        packed(packed_memory),
        workspace(memory),
        packing(args.size, args.keys, args.prompts, packed),
        few(kSplitsFewRows<Layout>
                ? few_rows(args.size.R, args.size.D, args.size.P, packing.task.operands, false, workspace)
                : FewRows{}) {}

  int pack(Queue queue) const { return launch_packing<T>(queue, packing.task); }

  int begin(Queue queue) const {
    if constexpr (kSplitsFewRows<Layout>) {
      if (few.exist()) return launch_first_slices(queue, op<false>(), kRest, few);
    }
    return 0;
  }

  int run(AptDone done, Queue queue) const {
    int error = done == AptDone::nothing ? pack(queue) : 0;
    if (!error && done != AptDone::beginning) error = begin(queue);
    if (error) return error;
    if constexpr (kSplitsFewRows<Layout>) {
      if (few.exist()) return launch_few_outputs(queue, op<false>(), few);
    }
    return launch_sandwich<Shape>(queue, op<kRest>());
  }

 private:
  template <bool kOpRest>
  AptForwardOp<T, kOpRest> op() const {
    AptForwardOp<T, kOpRest> op;
    set_operands(op, args.x, packing.first, packing.second, args.size.R, args.size.D, args.size.P);
    op.activation = args.activation;
    op.dropout = args.dropout;
    op.log_scale = args.log_scale.data;
    op.log_scale_dtype = args.log_scale.dtype;
    op.y = static_cast<const T*>(args.y.data);
    op.y_stride = args.y.stride;
    op.out = static_cast<T*>(args.out.data);
    op.gate = args.gate;
    op.scores = static_cast<typename KeptOf<T>::Type*>(args.scores.data);
    op.kept = static_cast<int>(args.size.kept());
    return op;
  }
};

// Calls function with the pass of a call.
template <class Function>
auto with_forward(const AptForward& args, void* packed, void* workspace, const Function& function) {
  return with_element(args.x.dtype, [&](auto element) {
    using T = decltype(element);
    const bool rest = args.activation == Activation::relu && args.keys.dtype == DType::float32;
    return with_forward_shape<T>(args.size.R, args.size.P, [&](auto shape) {
      if constexpr (sizeof(T) == 2) {
        if (rest) return function(AptForwardPass<T, decltype(shape), true>(args, packed, workspace));
      }
      return function(AptForwardPass<T, decltype(shape), false>(args, packed, workspace));
    });
  });
}

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

int64_t lean_packed_bytes(const AptForward& args) {
  return with_forward(args, nullptr, nullptr, [](const auto& pass) { return pass.packed.bytes(); });
}

bool packs_for_hopper(const AptForward& args) { return hopper_packs(args.x.dtype, args.size.D, args.size.P); }

// Weights for the Hopper path lie behind those for the lean one, which takes the calls of few rows.
void* for_hopper(const AptForward& args, void* packed) { return static_cast<char*>(packed) + lean_packed_bytes(args); }

}  // namespace

int64_t apt_packed_bytes(const AptForward& args) {
  return lean_packed_bytes(args) + (packs_for_hopper(args) ? apt_hopper_packed_bytes(args) : 0);
}

int64_t apt_forward_workspace(const AptForward& args) {
  return with_forward(args, nullptr, nullptr, [](const auto& pass) { return pass.workspace.bytes(); });
}

int apt_pack(const AptForward& args, void* packed, Queue queue) {
  const int error = with_forward(args, packed, nullptr, [&](const auto& pass) { return pass.pack(queue); });
  return error || !packs_for_hopper(args) ? error : apt_hopper_pack(args, for_hopper(args, packed), queue);
}

int apt_begin(const AptForward& args, void* packed, void* workspace, Queue queue) {
  if (args.size.R == 0) return 0;
  return with_forward(args, packed, workspace, [&](const auto& pass) { return pass.begin(queue); });
}

int apt_forward(const AptForward& args, void* packed, AptDone done, void* workspace, Queue queue) {
  const auto [R, D, P] = args.size;
  if (R == 0) return 0;
  if (hopper_choice() == HopperChoice::unknown) return kUnknownHopperChoice;
  if (!args.dropout.seeds && hopper_runs(R, D, P, args.x, args.y)) {
    return apt_hopper_forward(args, for_hopper(args, packed), done != AptDone::nothing, queue);
  }
  return with_forward(args, packed, workspace, [&](const auto& pass) { return pass.run(done, queue); });
}

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
