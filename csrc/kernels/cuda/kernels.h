// The CUDA kernels of every op, as the host calls them. Each call only puts work into the queue.
#pragma once
#include <cstdint>

#include "kernels/adapter.h"
#include "kernels/apt.h"
#include "kernels/attention_pool.h"

namespace petl::cuda {

struct Queue {
  int device;
  void* stream;  // a cudaStream_t
};

// What an op can compute. D is a multiple of kVectorWidth: rows are read by 16 bytes.
constexpr int64_t kVectorWidth = 8;
constexpr int64_t kMaxWidth = 8192;
constexpr int64_t kMaxInner = 512;  // of P and B

// These return 0, or an error that error_text explains. Those with a workspace need it in the device's memory.
int apt_forward(const AptForward& args, Queue queue);
int64_t apt_backward_workspace(const AptBackward& args);
int apt_backward(const AptBackward& args, void* workspace, Queue queue);

int adapter_forward(const AdapterForward& args, Queue queue);
int64_t adapter_backward_workspace(const AdapterBackward& args);
int adapter_backward(const AdapterBackward& args, void* workspace, Queue queue);

int64_t attention_pool_forward_workspace(const AttentionPoolForward& args);
int attention_pool_forward(const AttentionPoolForward& args, void* workspace, Queue queue);
int64_t attention_pool_backward_workspace(const AttentionPoolBackward& args);
int attention_pool_backward(const AttentionPoolBackward& args, void* workspace, Queue queue);

const char* error_text(int error);

}  // namespace petl::cuda
