#include "kernels/cuda/adapter_hopper.h"
#include "kernels/cuda/adapter_hopper_backward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"

namespace petl::cuda {
namespace {

struct AdapterRoom {
  void* weights;
  AdapterVectors vectors;
  float4* products;
  int64_t bytes;
};

AdapterRoom room_in(const AdapterBackward& args, void* memory) {
  const AdapterSizes& size = args.inputs.size;
  Partition partition(memory);
  void* const weights = partition.take<uint16_t>(hopper_packed_elements(size.D, size.B, 2));
  const AdapterVectors vectors = AdapterVectors::in(partition, size);
  const int64_t floats = hopper_blocks(size.R) * kHopperRows * hopper_inner(size.B);
  float4* const products = partition.take<float4>(floats / 4);
  return {weights, vectors, products, partition.bytes()};
}

int pack_weights(const AdapterBackward& args, const AdapterRoom& room, Queue queue) {
  const AdapterInputs& inputs = args.inputs;
  const auto [R, D, B] = inputs.size;
  HopperPacking<AdapterRows> packing = {};
  packing.rows = adapter_rows(inputs, room.vectors);
  packing.first[0] = {packing.rows.down, Order::columns, packing.rows.norm.weight};
  packing.first[1] = {weights_of(inputs.up, D, B), Order::depth};
  packing.second = {packing.rows.down, Order::depth};
  packing.firsts = 2;
  packing.D = static_cast<int>(D);
  packing.inner = hopper_inner(B);
  packing.target = room.weights;
  return with_half(inputs.x.dtype,
                   [&](auto element) { return launch_hopper_packing<decltype(element)>(queue, packing); });
}

template <class T, bool kHasNorm>
int launch_rows(const AdapterBackward& args, const AdapterRoom& room, const AdapterHopperKept& kept, Queue queue) {
  const AdapterInputs& inputs = args.inputs;
  const AdapterSizes& size = inputs.size;
  const auto run = [&](auto op) {
    op.D = static_cast<int>(size.D);
    op.B = static_cast<int>(size.B);
    op.kept = static_cast<int>(round_up(size.B, kVectorWidth));
    op.vectors = room.vectors;
    op.scale = {inputs.scale, inputs.gain.data, inputs.gain.dtype};
    op.epsilon = inputs.epsilon;
    op.statistics = static_cast<RowStatistics*>(kept.statistics);
    op.products = room.products;
    op.hidden = static_cast<T*>(kept.hidden);
    op.dhidden = static_cast<T*>(kept.dhidden);
    op.shares = kept.shares;
    HopperOperands operands{size.R, size.D, size.B, {inputs.x, args.dout}, {}, args.dx, room.weights, false};
    ConstRows& added = operands.added[kHasNorm ? 1 : 0];
    if (args.residual_is_input) added = args.dout;
    if (kHasNorm) operands.added[0] = inputs.x;
    return launch_hopper(queue, op, operands);
  };
  switch (inputs.activation) {
    case AdapterActivation::relu:
      return run(AdapterHopperBackwardOp<T, AdapterActivation::relu, kHasNorm>());
    case AdapterActivation::gelu:
      return run(AdapterHopperBackwardOp<T, AdapterActivation::gelu, kHasNorm>());
    default:
      return run(AdapterHopperBackwardOp<T, AdapterActivation::silu, kHasNorm>());
  }
}

}  // namespace

int64_t adapter_hopper_backward_bytes(const AdapterBackward& args) { return room_in(args, nullptr).bytes; }

int64_t adapter_hopper_shares(const AdapterBackward& args) { return hopper_shares(args.inputs.size.R); }

int adapter_hopper_backward_rows(const AdapterBackward& args, const AdapterHopperKept& kept, Queue queue) {
  const AdapterRoom room = room_in(args, kept.room);
  int error = hopper_error(queue.device);
  if (!error) error = pack_weights(args, room, queue);
  if (error) return error;
  return with_half(args.inputs.x.dtype, [&](auto element) {
    using T = decltype(element);
    return args.inputs.norm_weight.data ? launch_rows<T, true>(args, room, kept, queue)
                                        : launch_rows<T, false>(args, room, kept, queue);
  });
}

}  // namespace petl::cuda
