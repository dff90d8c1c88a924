#include <map>
#include <mutex>

#include "kernels/cuda/launch_hopper.h"
#include "kernels/cuda/tile_maps.h"

namespace petl::cuda {
namespace {

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
  return hopper_error_of(major, minor, tile_encoder() != nullptr);
}

}  // namespace

bool hopper_is_built() { return true; }

bool map_tiles(TileMap& map, DType dtype, const ConstRows& rows, int64_t R, int64_t D, int tile_rows) {
  static const EncodeTiles encode = tile_encoder();
  static_assert(kHopperChunk == 64);
  const auto type = dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode && encode_tiles(encode, map, type, rows.data, R, D, rows.stride, tile_rows);
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
