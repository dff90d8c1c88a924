// The adapter by the Hopper path, for what hopper_takes.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/kernels.h"

namespace petl::cuda {

int64_t adapter_hopper_packed_bytes(const AdapterForward& args);
int adapter_hopper_pack(const AdapterForward& args, void* packed, Queue queue);
int adapter_hopper_forward(const AdapterForward& args, void* packed, bool is_packed, Queue queue);

// What the rows of backward leave for the launches behind them, and the room that they need themselves.
struct AdapterHopperKept {
  void* room;
  void* statistics;  // RowStatistics [R], where there is a norm
  void* hidden;      // [R, kept], in the dtype of dout; null: no weight has a gradient
  void* dhidden;     // the same
  double* shares;    // of dgain; null: not wanted
};

int64_t adapter_hopper_backward_bytes(const AdapterBackward& args);  // of room
int64_t adapter_hopper_shares(const AdapterBackward& args);
int adapter_hopper_backward_rows(const AdapterBackward& args, const AdapterHopperKept& kept, Queue queue);

}  // namespace petl::cuda
