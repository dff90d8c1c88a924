// What the CUDA kernels of all ops share, as the host sees it. Those of an op are declared in kernels/cuda/<op>.h, and
// each call of them only puts work into the queue: it returns 0, or an error that error_text explains. Those with a
// workspace need it in the device's memory.
#pragma once
#include <cstdint>

namespace petl::cuda {

struct Queue {
  int device;
  void* stream;  // a cudaStream_t
};

// Of every op the width D is a multiple of kVectorWidth, since rows are read by 16 bytes, and at most kMaxWidth.
constexpr int64_t kVectorWidth = 8;
constexpr int64_t kMaxWidth = 8192;
constexpr int64_t kMaxInner = 512;  // of what sandwich.h makes

// What else bounds an op: its inner size, under its name.
struct Limits {
  const char* inner;
  int64_t max_inner;
};

const char* error_text(int error);

}  // namespace petl::cuda
