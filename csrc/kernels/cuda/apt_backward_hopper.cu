#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/apt_hopper_backward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"

namespace petl::cuda {
namespace {

int pack_weights(const AptBackward& args, void* packed, Queue queue) {
  const auto [R, D, P] = args.size;
  HopperPacking<NoRows> packing = {};
  packing.first[0] = {weights_of(args.prompts, P, D), Order::columns};
  packing.second = {weights_of(args.keys, P, D), Order::depth};
  packing.firsts = 1;
  packing.D = static_cast<int>(D);
  packing.inner = hopper_inner(P);
  packing.target = packed;
  return with_half(args.dout.dtype,
                   [&](auto element) { return launch_hopper_packing<decltype(element)>(queue, packing); });
}

template <class T, Activation kActivation>
int launch_rows(const AptBackward& args, const AptHopperKept& kept, Queue queue) {
  AptHopperBackwardOp<T, kActivation> op;
  op.log_scale = args.log_scale.data;
  op.log_scale_dtype = args.log_scale.dtype;
  op.y = args.dlog_scale ? static_cast<const T*>(args.y.data) : nullptr;
  op.y_stride = args.y.stride;
  op.dy = static_cast<T*>(args.dy.data);
  op.gate = args.gate;
  op.scores = static_cast<const typename KeptOf<T>::Type*>(args.scores.data);
  op.D = static_cast<int>(args.size.D);
  op.P = static_cast<int>(args.size.P);
  op.kept = static_cast<int>(args.size.kept());
  op.dscores = static_cast<T*>(kept.dscores);
  op.weighted = static_cast<T*>(kept.weighted);
  op.shares = kept.shares;
  const auto [R, D, P] = args.size;
  return launch_hopper(queue, op, {R, D, P, {args.dout}, {}, args.dx, kept.packed, false});
}

}  // namespace

int64_t apt_hopper_backward_bytes(const AptBackward& args) {
  return 2 * hopper_packed_elements(args.size.D, args.size.P, 1);
}

int64_t apt_hopper_shares(const AptBackward& args) { return hopper_shares(args.size.R); }

int apt_hopper_backward_rows(const AptBackward& args, const AptHopperKept& kept, Queue queue) {
  int error = hopper_error(queue.device);
  if (!error) error = pack_weights(args, kept.packed, queue);
  if (error) return error;
  return with_half(args.dout.dtype, [&](auto element) {
    using T = decltype(element);
    return args.activation == Activation::relu ? launch_rows<T, Activation::relu>(args, kept, queue)
                                               : launch_rows<T, Activation::softmax>(args, kept, queue);
  });
}

}  // namespace petl::cuda
