// CUDA C++ for a host compiler: .cu files compile as they are and run on the CPU, for tests without a GPU. Only what
// the kernels use is here.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <typeinfo>

#include "emulator/block.h"
#include "emulator/counts.h"
#include "emulator/cuda_types.h"
#include "emulator/ptx_on_cpu.h"
#include "emulator/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// Threads of the block and of a warp. All threads of a block must meet at one line; unlike on the device, those that
// have returned are missed.

inline void __syncthreads(const emulator::Place& place = emulator::here()) { emulator::running->meet_block(place); }

inline void __syncwarp(unsigned mask = emulator::kAllLanes, const emulator::Place& place = emulator::here()) {
  emulator::synchronize(mask, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              const emulator::Place& place = emulator::here()) {
  const int lane = static_cast<int>(emulator::running->lane());
  return emulator::shuffle(mask, value, (lane & -width) + (source & (width - 1)), place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int width = warpSize,
                  const emulator::Place& place = emulator::here()) {
  const int lane = static_cast<int>(emulator::running->lane()), source = lane ^ flipped;
  return emulator::shuffle(mask, value, source < (lane & -width) + width ? source : lane, place);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize,
                   const emulator::Place& place = emulator::here()) {
  const int lane = static_cast<int>(emulator::running->lane()), source = lane + static_cast<int>(distance);
  return emulator::shuffle(mask, value, source < (lane & -width) + width ? source : lane, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const emulator::Place& place = emulator::here()) {
  return emulator::vote(mask, predicate != 0, place);
}

inline int __any_sync(unsigned mask, int predicate, const emulator::Place& place = emulator::here()) {
  return emulator::vote(mask, predicate != 0, place) != 0;
}

// Arithmetic. What the device approximates is exact here, to a rounding.

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// A template yields to a function of the C library, where that has one.
template <class T>
T rsqrtf(T x) {
  return 1 / std::sqrt(x);
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The runtime library. Launches are done when they return.

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaFuncAttributes {
  int maxDynamicSharedSizeBytes;
};

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };  // no other is supported

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace emulator {

// Each parameter at the next address that is aligned for it, as the device has them.
template <class... Parameters>
std::vector<unsigned char> in_constant_memory(const std::tuple<Parameters...>& stored) {
  std::vector<unsigned char> bytes;
  const auto append = [&](const auto& parameter) {
    const size_t alignment = alignof(decltype(parameter));
    const size_t begin = (bytes.size() + alignment - 1) / alignment * alignment;
    bytes.resize(begin + sizeof parameter);
    std::memcpy(bytes.data() + begin, &parameter, sizeof parameter);
  };
  std::apply([&](const Parameters&... parameters) { (append(parameters), ...); }, stored);
  return bytes;
}

// What makes the device refuse a launch.
cudaError_t launch(const cudaLaunchConfig_t& config, Launch launch);

}  // namespace emulator

// Unlike CUDA's, throws std::runtime_error if the kernel goes wrong.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Kernel = void (*)(Parameters...);
  using Stored = std::tuple<Parameters...>;
  const Stored stored(static_cast<Parameters>(arguments)...);
  emulator::Launch launch;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.kernel_type = typeid(void(Parameters...)).name();
  launch.arguments = &stored;
  if constexpr (emulator::counts::kOn) launch.parameters = emulator::in_constant_memory(stored);
  launch.call = [](const void* kernel, const void* arguments) {
    std::apply(reinterpret_cast<Kernel>(const_cast<void*>(kernel)), *static_cast<const Stored*>(arguments));
  };
  return emulator::launch(*config, launch);
}
