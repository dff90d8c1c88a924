// The adapter's forward of few rows.
#pragma once
#include "kernels/cuda/adapter_forward.h"
#include "kernels/cuda/few_rows.h"

namespace petl::cuda {

template <class T>
int launch_few_rows(Queue queue, const AdapterForwardOp<T>& op, const FewRows& few);

}  // namespace petl::cuda
