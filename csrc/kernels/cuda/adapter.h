// The CUDA kernels of the bottleneck adapter, as the host calls them.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

inline constexpr Limits kAdapterLimits{"the bottleneck B", kMaxInner};

// Forward packs the weights, unless adapter_pack has: calls with the same weights, sizes D and B, and dtypes can share
// what it made. The workspace is for what else there is between the launches, often nothing.
int64_t adapter_packed_bytes(const AdapterForward& args);
int64_t adapter_forward_workspace(const AdapterForward& args);
int adapter_pack(const AdapterForward& args, void* packed, Queue queue);
int adapter_forward(const AdapterForward& args, void* packed, bool is_packed, void* workspace, Queue queue);
int64_t adapter_backward_workspace(const AdapterBackward& args);
int adapter_backward(const AdapterBackward& args, void* workspace, Queue queue);

// Backward with its rows by the Hopper path, on or off, for what hopper_takes; rows may be few.
int64_t adapter_hopper_workspace(const AdapterBackward& args);
int adapter_hopper_backward(const AdapterBackward& args, void* workspace, Queue queue);

}  // namespace petl::cuda
