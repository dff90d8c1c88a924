#include "kernels/cuda/adapter_hopper.h"
#include "kernels/cuda/adapter_hopper_forward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"

namespace petl::cuda {
namespace {

// Where the packed weights lie, and the rows beside them.
struct AdapterPlace {
  void* weights;
  AdapterVectors vectors;
  int64_t bytes;
};

AdapterPlace packed_in(const AdapterForward& args, void* memory) {
  const AdapterSizes& size = args.inputs.size;
  Partition partition(memory);
  void* const weights = partition.take<uint16_t>(hopper_packed_elements(size.D, size.B, 1));
  const AdapterVectors vectors = AdapterVectors::in(partition, size);
  return {weights, vectors, partition.bytes()};
}

template <class T, bool kHasNorm>
int forward(const AdapterForward& args, const AdapterPlace& packed, Queue queue) {
  const AdapterInputs& inputs = args.inputs;
  const AdapterSizes& size = inputs.size;
  const auto run = [&](auto op) {
    op.D = static_cast<int>(size.D);
    op.B = static_cast<int>(size.B);
    op.vectors = packed.vectors;
    op.scale = {inputs.scale, inputs.gain.data, inputs.gain.dtype};
    op.epsilon = inputs.epsilon;
    return launch_hopper(queue, op,
                         {size.R, size.D, size.B, {inputs.x}, {args.residual}, args.out, packed.weights, false});
  };
  switch (inputs.activation) {
    case AdapterActivation::relu:
      return run(AdapterHopperOp<T, AdapterActivation::relu, kHasNorm>());
    case AdapterActivation::gelu:
      return run(AdapterHopperOp<T, AdapterActivation::gelu, kHasNorm>());
    default:
      return run(AdapterHopperOp<T, AdapterActivation::silu, kHasNorm>());
  }
}

}  // namespace

int64_t adapter_hopper_packed_bytes(const AdapterForward& args) { return packed_in(args, nullptr).bytes; }

int adapter_hopper_pack(const AdapterForward& args, void* packed, Queue queue) {
  if (const int error = hopper_error(queue.device)) return error;
  const AdapterInputs& inputs = args.inputs;
  const auto [R, D, B] = inputs.size;
  const AdapterPlace place = packed_in(args, packed);
  HopperPacking<AdapterRows> packing = {};
  packing.rows = adapter_rows(inputs, place.vectors);
  packing.first[0] = {packing.rows.down, Order::columns, packing.rows.norm.weight};
  packing.second = {weights_of(inputs.up, D, B), Order::columns};
  packing.firsts = 1;
  packing.D = static_cast<int>(D);
  packing.inner = hopper_inner(B);
  packing.target = place.weights;
  return with_half(inputs.x.dtype,
                   [&](auto element) { return launch_hopper_packing<decltype(element)>(queue, packing); });
}

int adapter_hopper_forward(const AdapterForward& args, void* packed, bool is_packed, Queue queue) {
  const int error = is_packed ? hopper_error(queue.device) : adapter_hopper_pack(args, packed, queue);
  if (error) return error;
  const AdapterPlace place = packed_in(args, packed);
  return with_half(args.inputs.x.dtype, [&](auto element) {
    using T = decltype(element);
    return args.inputs.norm_weight.data ? forward<T, true>(args, place, queue) : forward<T, false>(args, place, queue);
  });
}

}  // namespace petl::cuda
