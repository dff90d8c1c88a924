// Prompt diffusion's forward on CUDA, in two launches, of which the first packs the weights, or three where rows are
// few.
#include "kernels/cuda/apt.h"
#include "kernels/cuda/apt_few_rows.h"
#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/apt_passes.h"
#include "kernels/cuda/hopper.h"

namespace petl::cuda {
namespace {

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

}  // namespace petl::cuda
