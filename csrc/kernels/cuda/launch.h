// What the host needs to launch a kernel.
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/weights.h"

namespace petl::cuda {

struct Grid {
  dim3 blocks;
  int threads;
  int shared_bytes;
};

// Errors beside CUDA's own, which are positive.
constexpr int kTooLittleSharedMemory = -1;

inline bool has_shared_memory(int device, int bytes) {
  int limit = 0;
  return cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
         bytes <= limit;
}

// Loads a kernel on the current device, and lets its blocks have so much dynamic shared memory: once, and also where
// the first use is inside of a stream's capture.
cudaError_t prepare(const void* kernel, int device, int shared_bytes);

template <class... Arguments>
inline int launch(Queue queue, const Grid& grid, void (*kernel)(Arguments...), const Arguments&... arguments) {
  // torch has made the device current in its own copy of the CUDA runtime; the one linked here shares the device's
  // context with it, but not its choice.
  cudaError_t error = cudaSetDevice(queue.device);
  if (error == cudaSuccess) error = prepare(reinterpret_cast<const void*>(kernel), queue.device, grid.shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid.blocks;
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(queue.stream);
    error = cudaLaunchKernelEx(&config, kernel, Arguments(arguments)...);
  }
  if (error == cudaSuccess) return 0;
  // An error that is left standing would be blamed on torch's next call.
  cudaGetLastError();
  return has_shared_memory(queue.device, grid.shared_bytes) ? error : kTooLittleSharedMemory;
}

// Calls function with an element of the dtype's type.
template <class Function>
inline auto with_element(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::bfloat16:
      return function(Bfloat16{});
    case DType::float16:
      return function(Float16{});
    default:
      return function(float{});
  }
}

// The same of a dtype of 16 bits.
template <class Function>
inline auto with_half(DType dtype, const Function& function) {
  return dtype == DType::bfloat16 ? function(Bfloat16{}) : function(Float16{});
}

inline int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }
inline int64_t round_up(int64_t count, int64_t to) { return divide_up(count, to) * to; }

inline Weights weights_of(const ConstRows& rows, int64_t count, int64_t columns) {
  const int64_t bytes = rows.dtype == DType::float32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * bytes % 16 == 0;
  return {rows.data, rows.stride, rows.dtype, aligned, static_cast<int>(count), static_cast<int>(columns)};
}

// Shares out a workspace, in 256-byte steps. With a null workspace it only counts.
class Partition {
 public:
  explicit Partition(void* begin) : begin_(static_cast<char*>(begin)) {}

  template <class T>
  T* take(int64_t count) {
    char* part = begin_ ? begin_ + bytes_ : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(part);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

}  // namespace petl::cuda
