// The CUDA kernels of prompt diffusion, as the host calls them.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

inline constexpr Limits kAptLimits{"the number of prompts P", kMaxInner};

// What of a forward has been queued before it.
enum class AptDone { nothing, packing, beginning };

// Forward packs the weights, unless apt_pack has: calls with the same weights, sizes D and P, and dtypes can share what
// it made. The workspace is for what else there is between the launches: nothing, unless rows are few. What depends on
// x alone is then left there by apt_begin, perhaps before y is known; of args it reads sizes, activation, x and the
// keys' dtype.
int64_t apt_packed_bytes(const AptForward& args);
int64_t apt_forward_workspace(const AptForward& args);
int apt_pack(const AptForward& args, void* packed, Queue queue);
int apt_begin(const AptForward& args, void* packed, void* workspace, Queue queue);
int apt_forward(const AptForward& args, void* packed, AptDone done, void* workspace, Queue queue);
int64_t apt_backward_workspace(const AptBackward& args);
int apt_backward(const AptBackward& args, void* workspace, Queue queue);

// Backward with its rows by the Hopper path, on or off, for what hopper_takes; rows may be few.
int64_t apt_hopper_workspace(const AptBackward& args);
int apt_hopper_backward(const AptBackward& args, void* workspace, Queue queue);

}  // namespace petl::cuda
