// What the adapter's backward through LayerNorm needs of the weights alone: see NormTerms in adapter_backward.h.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/launch.h"

namespace petl::cuda {

// Both are [B].
int find_norm_terms(Queue queue, const AdapterInputs& inputs, float* mean_weight, float* bias);

}  // namespace petl::cuda
