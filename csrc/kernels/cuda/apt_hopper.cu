#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/apt_hopper_forward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"

namespace petl::cuda {
namespace {

bool has_rest(const AptForward& args) {
  return args.activation == Activation::relu && args.keys.dtype == DType::float32;
}

template <class T>
int forward(const AptForward& args, const void* packed, Queue queue) {
  const auto run = [&](auto op) {
    op.log_scale = args.log_scale.data;
    op.log_scale_dtype = args.log_scale.dtype;
    op.gate = args.gate;
    op.scores = static_cast<typename KeptOf<T>::Type*>(args.scores.data);
    op.P = static_cast<int>(args.size.P);
    op.kept = static_cast<int>(args.size.kept());
    const auto [R, D, P] = args.size;
    return launch_hopper(queue, op, {R, D, P, {args.x}, {args.y}, args.out, packed, has_rest(args)});
  };
  if (args.activation == Activation::relu) return run(AptHopperOp<T, Activation::relu>());
  return run(AptHopperOp<T, Activation::softmax>());
}

}  // namespace

int64_t apt_hopper_packed_bytes(const AptForward& args) {
  return 2 * hopper_packed_elements(args.size.D, args.size.P, has_rest(args) ? 2 : 1);
}

int apt_hopper_pack(const AptForward& args, void* packed, Queue queue) {
  if (const int error = hopper_error(queue.device)) return error;
  const auto [R, D, P] = args.size;
  HopperPacking<NoRows> packing = {};
  packing.first[0] = {weights_of(args.keys, P, D), Order::columns};
  packing.second = {weights_of(args.prompts, P, D), Order::depth};
  packing.firsts = 1;
  packing.D = static_cast<int>(D);
  packing.inner = hopper_inner(P);
  packing.rest = has_rest(args);
  packing.target = packed;
  return with_half(args.x.dtype,
                   [&](auto element) { return launch_hopper_packing<decltype(element)>(queue, packing); });
}

int apt_hopper_forward(const AptForward& args, void* packed, bool is_packed, Queue queue) {
  const int error = is_packed ? hopper_error(queue.device) : apt_hopper_pack(args, packed, queue);
  if (error) return error;
  return with_half(args.x.dtype, [&](auto element) { return forward<decltype(element)>(args, packed, queue); });
}

}  // namespace petl::cuda
