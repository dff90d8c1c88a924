// The CUDA kernels of prompt diffusion, as the host calls them.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

inline constexpr Limits kAptLimits{"the number of prompts P", kMaxInner};

// Forward's workspace holds the packed weights and nothing else. Calls with the same weights, sizes D and P, and dtypes
// can share one that apt_pack has filled.
int64_t apt_forward_workspace(const AptForward& args);
int apt_pack(const AptForward& args, void* workspace, Queue queue);
int apt_forward(const AptForward& args, void* workspace, bool is_packed, Queue queue);
int64_t apt_backward_workspace(const AptBackward& args);
int apt_backward(const AptBackward& args, void* workspace, Queue queue);

}  // namespace petl::cuda
