// The CUDA kernels of prompt diffusion, as the host calls them.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

inline constexpr Limits kAptLimits{"the number of prompts P", kMaxInner};

// Forward packs the weights, unless apt_pack has: calls with the same weights, sizes D and P, and dtypes can share what
// it made. The workspace is for what else there is between the launches, often nothing.
int64_t apt_packed_bytes(const AptForward& args);
int64_t apt_forward_workspace(const AptForward& args);
int apt_pack(const AptForward& args, void* packed, Queue queue);
int apt_forward(const AptForward& args, void* packed, bool is_packed, void* workspace, Queue queue);
int64_t apt_backward_workspace(const AptBackward& args);
int apt_backward(const AptBackward& args, void* workspace, Queue queue);

}  // namespace petl::cuda
