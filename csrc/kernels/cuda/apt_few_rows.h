// Prompt diffusion's forward of few rows.
#pragma once
#include "kernels/cuda/apt_forward.h"
#include "kernels/cuda/few_rows.h"

namespace petl::cuda {

// Reads nothing of the op but what is known of x. `rest`: whether the keys are packed with what rounding left out.
template <class T>
int launch_first_slices(Queue queue, const AptForwardOp<T, false>& op, bool rest, const FewRows& few);

template <class T>
int launch_few_outputs(Queue queue, const AptForwardOp<T, false>& op, const FewRows& few);

}  // namespace petl::cuda
