// Prompt diffusion's forward by the Hopper path, for what hopper_takes.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

int64_t apt_hopper_packed_bytes(const AptForward& args);
int apt_hopper_pack(const AptForward& args, void* packed, Queue queue);
int apt_hopper_forward(const AptForward& args, void* packed, bool is_packed, Queue queue);

}  // namespace petl::cuda
