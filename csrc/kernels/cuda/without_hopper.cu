// In place of the Hopper path's files, in a build without code for sm_90a.
#include "kernels/cuda/adapter_hopper.h"
#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/hopper.h"

namespace petl::cuda {

bool hopper_is_built() { return false; }

int64_t apt_hopper_packed_bytes(const AptForward&) { return 0; }
int apt_hopper_pack(const AptForward&, void*, Queue) { return kHopperIsNotBuilt; }
int apt_hopper_forward(const AptForward&, void*, bool, Queue) { return kHopperIsNotBuilt; }
int64_t apt_hopper_backward_bytes(const AptBackward&) { return 0; }
int64_t apt_hopper_shares(const AptBackward&) { return 0; }
int apt_hopper_backward_rows(const AptBackward&, const AptHopperKept&, Queue) { return kHopperIsNotBuilt; }

int64_t adapter_hopper_packed_bytes(const AdapterForward&) { return 0; }
int adapter_hopper_pack(const AdapterForward&, void*, Queue) { return kHopperIsNotBuilt; }
int adapter_hopper_forward(const AdapterForward&, void*, bool, Queue) { return kHopperIsNotBuilt; }

int64_t adapter_hopper_backward_bytes(const AdapterBackward&) { return 0; }
int64_t adapter_hopper_shares(const AdapterBackward&) { return 0; }
int adapter_hopper_backward_rows(const AdapterBackward&, const AdapterHopperKept&, Queue) { return kHopperIsNotBuilt; }

}  // namespace petl::cuda
