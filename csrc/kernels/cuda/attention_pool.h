// The CUDA kernels of attention pooling, as the host calls them.
#pragma once
#include "kernels/attention_pool.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

inline constexpr Limits kAttentionPoolLimits{"the number of heads H", 64};

int64_t attention_pool_forward_workspace(const AttentionPoolForward& args);
int attention_pool_forward(const AttentionPoolForward& args, void* workspace, Queue queue);
int64_t attention_pool_backward_workspace(const AttentionPoolBackward& args);
int attention_pool_backward(const AttentionPoolBackward& args, void* workspace, Queue queue);

}  // namespace petl::cuda
