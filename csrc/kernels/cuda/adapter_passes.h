// What both directions' launches of the adapter are made of.
#pragma once
#include "kernels/cuda/adapter_forward.h"

namespace petl::cuda {

inline Scale scale_of(const AdapterInputs& inputs) { return {inputs.scale, inputs.gain.data, inputs.gain.dtype}; }

// The parameters as the kernels of a pass take them.
template <class T, class Layout, class Shape>
struct AdapterPacking {
  AdapterVectors vectors;
  PackTask<AdapterRows> task;
  const T* down;  // of the first product with x

  AdapterPacking(const AdapterInputs& inputs, Partition& partition)
      : vectors(AdapterVectors::in(partition, inputs.size)) {
    const auto [R, D, B] = inputs.size;
    task = {};
    task.rows = adapter_rows(inputs, vectors);
    task.operands[0] = first_operand<Layout>(task.rows.down, Order::columns, D, B);
    if (kFolds<T>) task.operands[0].gain = task.rows.norm.weight;
    down = place_operand<T>(task.operands[0], partition);
  }
};

template <class T>
void set_first(AdapterFirst<T>& op, const AdapterInputs& inputs, const T* down, const T* up,
               const AdapterVectors& vectors) {
  const auto [R, D, B] = inputs.size;
  set_operands(op, inputs.x, down, up, R, D, B);
  op.has_norm = inputs.norm_weight.data != nullptr;
  op.epsilon = inputs.epsilon;
  op.vectors = vectors;
}

}  // namespace petl::cuda
