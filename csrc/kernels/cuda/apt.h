// The CUDA kernels of prompt diffusion, as the host calls them.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

inline constexpr Limits kAptLimits{"the number of prompts P", kMaxInner};

int64_t apt_forward_workspace(const AptForward& args);
int apt_forward(const AptForward& args, void* workspace, Queue queue);
int64_t apt_backward_workspace(const AptBackward& args);
int apt_backward(const AptBackward& args, void* workspace, Queue queue);

}  // namespace petl::cuda
