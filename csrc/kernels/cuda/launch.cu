#include <map>
#include <mutex>

#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch.h"

namespace petl::cuda {
namespace {

// What kernels have been prepared for. Never destroyed: a launch may be the last thing that a process does.
class Prepared {
 public:
  bool has(const void* kernel, int device, int shared_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bytes_.find({kernel, device});
    return found != bytes_.end() && found->second >= shared_bytes;
  }
  void note(const void* kernel, int device, int shared_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_[{kernel, device}] = shared_bytes;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, int> bytes_;
};

cudaError_t load(const void* kernel, int shared_bytes) {
  // CUDA loads kernels when they are first asked for.
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  // Above 48 kB of shared memory a kernel has to ask.
  if (error != cudaSuccess || shared_bytes <= 48 << 10) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

}  // namespace

cudaError_t prepare(const void* kernel, int device, int shared_bytes) {
  static Prepared* const prepared = new Prepared;
  if (prepared->has(kernel, device, shared_bytes)) return cudaSuccess;
  // Of a thread that captures, other modes refuse what loading may do.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  error = load(kernel, shared_bytes);
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) error = restored;
  if (error == cudaSuccess) prepared->note(kernel, device, shared_bytes);
  return error;
}

const char* error_text(int error) {
  if (error == kTooLittleSharedMemory) return "a block of this GPU has too little shared memory for these sizes";
  if (const char* const text = hopper_error_text(error)) return text;
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace petl::cuda
