// The part of CUDA's runtime library that the kernels' callers use.
#include <map>
#include <mutex>

#include "emulator/counts.h"
#include "emulator/cuda_on_cpu.h"

namespace {

constexpr size_t kDefaultSharedLimit = size_t{48} << 10;
constexpr int kMultiprocessors = 132;

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// How much dynamic shared memory kernels may have.
class SharedLimits {
 public:
  void set(const void* kernel, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limits_[kernel] = bytes;
  }
  size_t of(const void* kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = limits_.find(kernel);
    return found == limits_.end() ? kDefaultSharedLimit : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<const void*, size_t> limits_;
};

SharedLimits& shared_limits() {
  static SharedLimits limits;
  return limits;
}

bool fits(dim3 size, unsigned x, unsigned y, unsigned z) {
  return size.x && size.y && size.z && size.x <= x && size.y <= y && size.z <= z;
}

// Blocks in a cluster, or 0 for what the emulator does not have.
unsigned cluster_of(const cudaLaunchConfig_t& config) {
  if (config.numAttrs == 0) return 1;
  const auto& size = config.attrs[0].val.clusterDim;
  const bool known = config.numAttrs == 1 && config.attrs[0].id == cudaLaunchAttributeClusterDimension;
  return known && size.y == 1 && size.z == 1 && size.x <= emulator::kMaxCluster ? size.x : 0;
}

cudaError_t refusal(const cudaLaunchConfig_t& config, const void* kernel, size_t device_limit) {
  const dim3 block = config.blockDim;
  const unsigned cluster = cluster_of(config);
  if (cluster == 0 || config.gridDim.x % cluster) return cudaErrorInvalidConfiguration;
  if (!fits(config.gridDim, 0x7fffffff, 0xffff, 0xffff) || !fits(block, 1024, 1024, 64) ||
      cluster * ((block.x * block.y * block.z + 31) / 32 * 32) > emulator::kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  const size_t limit = shared_limits().of(kernel);
  return config.dynamicSmemBytes > std::min(limit, device_limit) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

cudaError_t emulator::launch(const cudaLaunchConfig_t& config, Launch launch) {
  launch.settings = settings();
  const cudaError_t refused = refusal(config, launch.kernel, launch.settings.shared_memory_limit);
  if (refused != cudaSuccess) return noted(refused);
  launch.grid = config.gridDim;
  launch.block = config.blockDim;
  launch.cluster = cluster_of(config);
  launch.shared_bytes = config.dynamicSmemBytes;
  counts::begin_launch(launch);
  run(launch);
  counts::end_launch();
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unrecognized error code";
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return noted(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return noted(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulator::settings().shared_memory_limit);
      return cudaSuccess;
  }
  return noted(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > emulator::settings().shared_memory_limit) {
    return noted(cudaErrorInvalidValue);
  }
  shared_limits().set(kernel, static_cast<size_t>(value));
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(shared_limits().of(kernel));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const unsigned blocks = cluster_of(*config);
  *clusters = blocks ? kMultiprocessors / static_cast<int>(blocks) : 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return cudaSuccess;
}
