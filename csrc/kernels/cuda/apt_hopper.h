// Prompt diffusion by the Hopper path, for what hopper_takes.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

int64_t apt_hopper_packed_bytes(const AptForward& args);
int apt_hopper_pack(const AptForward& args, void* packed, Queue queue);
int apt_hopper_forward(const AptForward& args, void* packed, bool is_packed, Queue queue);

// What the rows of backward leave for the launches behind them, and the room for their weights.
struct AptHopperKept {
  void* packed;
  void* dscores;   // [R, kept], in the dtype of dout; null: no weight has a gradient
  void* weighted;  // the same
  double* shares;  // of dlog_scale
};

int64_t apt_hopper_backward_bytes(const AptBackward& args);  // of packed
int64_t apt_hopper_shares(const AptBackward& args);
int apt_hopper_backward_rows(const AptBackward& args, const AptHopperKept& kept, Queue queue);

}  // namespace petl::cuda
