// The adapter's forward on CUDA: packs the weights and computes the rows, few ones in two launches.
#include "kernels/cuda/adapter.h"
#include "kernels/cuda/adapter_few_rows.h"
#include "kernels/cuda/adapter_hopper.h"
#include "kernels/cuda/adapter_passes.h"
#include "kernels/cuda/hopper.h"

namespace petl::cuda {
namespace {

template <class T, class Shape>
struct AdapterForwardPass {
  using Layout = SandwichLayout<Shape, false>;

  const AdapterForward& args;
  Partition packed, workspace;
  AdapterPacking<T, Layout, Shape> packing;
  const T* up;
  FewRows few;

  AdapterForwardPass(const AdapterForward& args, void* packed_memory, void* memory)
      : args(args), packed(packed_memory), workspace(memory), packing(args.inputs, packed) {
    const auto [R, D, B] = args.inputs.size;
    PackedOperand& operand = packing.task.operands[1];
    operand = second_operand<Layout, Shape>(weights_of(args.inputs.up, D, B), Order::columns, D, B);
    up = place_operand<T>(operand, packed);
    if constexpr (kSplitsFewRows<Layout>) {
      few = few_rows(R, D, B, packing.task.operands, args.inputs.norm_weight.data != nullptr, workspace);
    }
  }

  int pack(Queue queue) const { return launch_packing<T>(queue, packing.task); }

  int run(bool is_packed, Queue queue) const {
    AdapterForwardOp<T> op = {};
    set_first(op, args.inputs, packing.down, up, packing.vectors);
    op.activation = args.inputs.activation;
    op.dropout = args.inputs.dropout;
    op.scale = scale_of(args.inputs);
    op.residual = static_cast<const T*>(args.residual.data);
    op.residual_stride = args.residual.stride;
    op.out = static_cast<T*>(args.out.data);
    const int error = is_packed ? 0 : pack(queue);
    if (error) return error;
    if constexpr (kSplitsFewRows<Layout>) {
      if (few.exist()) return launch_few_rows(queue, op, few);
    }
    return launch_sandwich<Shape>(queue, op);
  }
};

// Calls function with the pass of a call.
template <class Function>
auto with_pass(const AdapterForward& args, void* packed, void* workspace, const Function& function) {
  const AdapterSizes& size = args.inputs.size;
  return with_element(args.inputs.x.dtype, [&](auto element) {
    using T = decltype(element);
    return with_forward_shape<T>(size.R, size.B, [&](auto shape) {
      return function(AdapterForwardPass<T, decltype(shape)>(args, packed, workspace));
    });
  });
}

int64_t lean_packed_bytes(const AdapterForward& args) {
  return with_pass(args, nullptr, nullptr, [](const auto& pass) { return pass.packed.bytes(); });
}

bool packs_for_hopper(const AdapterForward& args) {
  const AdapterSizes& size = args.inputs.size;
  return hopper_packs(args.inputs.x.dtype, size.D, size.B);
}

// Weights for the Hopper path lie behind those for the lean one, which takes the calls of few rows.
void* for_hopper(const AdapterForward& args, void* packed) {
  return static_cast<char*>(packed) + lean_packed_bytes(args);
}

}  // namespace

int64_t adapter_packed_bytes(const AdapterForward& args) {
  return lean_packed_bytes(args) + (packs_for_hopper(args) ? adapter_hopper_packed_bytes(args) : 0);
}

int64_t adapter_forward_workspace(const AdapterForward& args) {
  return with_pass(args, nullptr, nullptr, [](const auto& pass) { return pass.workspace.bytes(); });
}

int adapter_pack(const AdapterForward& args, void* packed, Queue queue) {
  const int error = with_pass(args, packed, nullptr, [&](const auto& pass) { return pass.pack(queue); });
  return error || !packs_for_hopper(args) ? error : adapter_hopper_pack(args, for_hopper(args, packed), queue);
}

int adapter_forward(const AdapterForward& args, void* packed, bool is_packed, void* workspace, Queue queue) {
  const auto [R, D, B] = args.inputs.size;
  if (R == 0) return 0;
  if (hopper_choice() == HopperChoice::unknown) return kUnknownHopperChoice;
  if (!args.inputs.dropout.seeds && hopper_runs(R, D, B, args.inputs.x, args.residual)) {
    return adapter_hopper_forward(args, for_hopper(args, packed), is_packed, queue);
  }
  return with_pass(args, packed, workspace, [&](const auto& pass) { return pass.run(is_packed, queue); });
}

}  // namespace petl::cuda
