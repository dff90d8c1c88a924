// The CUDA kernels of the bottleneck adapter, as the host calls them.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

inline constexpr Limits kAdapterLimits{"the bottleneck B", kMaxInner};

// Forward's workspace holds the packed weights and nothing else. Calls with the same weights, sizes D and B, and dtypes
// can share one that adapter_pack has filled.
int64_t adapter_forward_workspace(const AdapterForward& args);
int adapter_pack(const AdapterForward& args, void* workspace, Queue queue);
int adapter_forward(const AdapterForward& args, void* workspace, bool is_packed, Queue queue);
int64_t adapter_backward_workspace(const AdapterBackward& args);
int adapter_backward(const AdapterBackward& args, void* workspace, Queue queue);

}  // namespace petl::cuda
