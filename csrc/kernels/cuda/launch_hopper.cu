#include <map>
#include <mutex>

#include "kernels/cuda/launch_hopper.h"

namespace petl::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function: its library is not linked.
Encode encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  const bool is_there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  if (!is_there) cudaGetLastError();
  return is_there ? reinterpret_cast<Encode>(function) : nullptr;
}

// Answers that a device gives once.
template <class Key>
class Answers {
 public:
  template <class Ask>
  int of(const Key& key, const Ask& ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = answers_.find(key);
    if (found != answers_.end()) return found->second;
    return answers_[key] = ask();
  }

 private:
  std::mutex mutex_;
  std::map<Key, int> answers_;
};

int ask_device(int device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return cudaGetLastError();
  return hopper_error_of(major, minor, encoder() != nullptr);
}

}  // namespace

bool hopper_is_built() { return true; }

bool map_tiles(TileMap& map, DType dtype, const ConstRows& rows, int64_t R, int64_t D, int tile_rows) {
  static const Encode encode = encoder();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(R)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(rows.stride) * 2};
  const cuuint32_t tile[] = {kHopperChunk, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1};
  const auto type = dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode && encode(&map, type, 2, const_cast<void*>(rows.data), sizes, strides, tile, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int hopper_error(int device) {
  static auto* const answers = new Answers<int>;
  return answers->of(device, [&] { return ask_device(device); });
}

int cluster_error(const void* kernel, const cudaLaunchConfig_t& config, int device) {
  static auto* const answers = new Answers<std::pair<const void*, int>>;
  return answers->of({kernel, device}, [&] {
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return static_cast<int>(cudaGetLastError());
    return clusters > 0 ? 0 : static_cast<int>(kNoRoomForCluster);
  });
}

}  // namespace petl::cuda
