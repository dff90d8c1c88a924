// Launches the Hopper path's skeleton.
#pragma once
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/hopper_sandwich.h"
#include "kernels/cuda/launch.h"

namespace petl::cuda {

// A map of [R, D] by tiles of so many rows. False where the driver refuses, or has none.
bool map_tiles(TileMap& map, DType dtype, const ConstRows& rows, int64_t R, int64_t D, int tile_rows);

// 0, or what keeps this device from running the path; it knows its answers.
int hopper_error(int device);

// 0, or that the device cannot hold a cluster of a kernel's blocks, which has been prepared.
int cluster_error(const void* kernel, const cudaLaunchConfig_t& config, int device);

// No GPU of compute capability 9.0 has more multiprocessors.
constexpr int kMostHopperBlocks = 144;

// As many blocks as a launch may have.
inline int64_t hopper_blocks(int64_t R) {
  constexpr int kMostCluster = 2;
  const int64_t blocks = round_up(divide_up(R, kHopperRows), kMostCluster);
  return blocks < kMostHopperBlocks ? blocks : kMostHopperBlocks;
}

// By persistent blocks, in whole clusters: those without rows of their own help to copy the weights.
template <class Op, int kInner, int kCluster>
int launch_hopper_shape(Queue queue, const HopperTask<Op>& task, int64_t most_blocks) {
  using Its = HopperStage<kInner, Op::kTiles>;
  const auto kernel = &hopper_sandwich<Op, kInner, kCluster>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  const int64_t blocks = round_up(divide_up(task.R, kHopperRows), kCluster);
  most_blocks = most_blocks / kCluster * kCluster;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks));
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = Its::kSharedBytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &cluster;
  config.numAttrs = kCluster > 1 ? 1 : 0;
  int error = cudaSetDevice(queue.device);
  if (!error) error = prepare(address, queue.device, Its::kSharedBytes);
  if (!error && kCluster > 1) error = cluster_error(address, config, queue.device);
  if (!error) error = cudaLaunchKernelEx(&config, kernel, HopperTask<Op>(task));
  // An error that is left standing would be blamed on torch's next call.
  if (error) cudaGetLastError();
  return error;
}

template <class Op, size_t... kShapes>
int launch_hopper_inner(Queue queue, const HopperTask<Op>& task, int inner, std::index_sequence<kShapes...>) {
  int multiprocessors = 0;
  int error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, queue.device);
  const auto launch_if = [&](auto index) {
    constexpr HopperShape kShape = kHopperShapes[decltype(index)::value];
    if (error || kShape.inner != inner) return;
    error = launch_hopper_shape<Op, kShape.inner, kShape.cluster>(
        queue, task, multiprocessors < kMostHopperBlocks ? multiprocessors : kMostHopperBlocks);
  };
  (launch_if(std::integral_constant<size_t, kShapes>()), ...);
  return error;
}

struct HopperOperands {
  int64_t R, D, inner;
  ConstRows left[2], added[2];  // as many as the op has; null where nothing is added
  Rows out;                     // null: there is no second product
  const void* weights;          // packed
  bool rest;
};

// False where the driver makes no maps of the operands.
template <class Op>
bool set_hopper_task(HopperTask<Op>& task, const Op& op, const HopperOperands& operands) {
  const auto& [R, D, inner, left, added, out, weights, rest] = operands;
  const DType dtype = left[0].dtype;
  // What is not there is mapped as what is.
  const ConstRows out_rows = {out.data, D, out.dtype};
  bool is_mapped = map_tiles(task.out, dtype, out.data ? out_rows : left[0], R, D, kWarpRows);
  for (int i = 0; i < Op::kLefts; ++i) is_mapped &= map_tiles(task.left[i], dtype, left[i], R, D, kGroupRows);
  for (int i = 0; i < Op::kTiles; ++i) {
    task.adds[i] = added[i].data != nullptr;
    is_mapped &= map_tiles(task.added[i], dtype, task.adds[i] ? added[i] : left[0], R, D, kGroupRows);
  }
  task.weights = weights;
  task.R = R;
  task.D = static_cast<int>(D);
  task.passes = Op::kLefts + (rest ? 1 : 0);
  task.writes = out.data != nullptr;
  task.op = op;
  return is_mapped;
}

template <class Op>
int launch_hopper(Queue queue, const Op& op, const HopperOperands& operands) {
  HopperTask<Op> task;
  if (!set_hopper_task(task, op, operands)) return kNoTileMaps;
  return launch_hopper_inner(queue, task, hopper_inner(operands.inner), std::make_index_sequence<kHopperShapeCount>());
}

}  // namespace petl::cuda
