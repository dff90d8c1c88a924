// Prompt diffusion's forward of few rows.
#pragma once
#include "kernels/cuda/apt_forward.h"
#include "kernels/cuda/few_rows.h"

namespace petl::cuda {

// `rest`: whether the keys are packed with what rounding left out of them.
template <class T>
int launch_few_rows(Queue queue, const AptForwardOp<T, false>& op, bool rest, const FewRows& few);

}  // namespace petl::cuda
