// The adapter's forward by the Hopper path, for what hopper_takes.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

int64_t adapter_hopper_packed_bytes(const AdapterForward& args);
int adapter_hopper_pack(const AdapterForward& args, void* packed, Queue queue);
int adapter_hopper_forward(const AdapterForward& args, void* packed, bool is_packed, Queue queue);

}  // namespace petl::cuda
