// What both directions' launches of prompt diffusion are made of.
#pragma once
#include "kernels/cuda/apt_forward.h"

namespace petl::cuda {

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

}  // namespace petl::cuda
