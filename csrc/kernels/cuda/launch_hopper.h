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

// By persistent blocks, in whole clusters: those without rows of their own help to copy the weights.
template <class Op, int kInner, int kCluster>
int launch_hopper_shape(Queue queue, const HopperTask<Op>& task, int64_t most_blocks) {
  using Its = HopperStage<kInner>;
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
    error = launch_hopper_shape<Op, kShape.inner, kShape.cluster>(queue, task, multiprocessors);
  };
  (launch_if(std::integral_constant<size_t, kShapes>()), ...);
  return error;
}

// Calls function with an element of a type that hopper_takes.
template <class Function>
int with_half(DType dtype, const Function& function) {
  return dtype == DType::bfloat16 ? function(Bfloat16{}) : function(Float16{});
}

struct HopperOperands {
  int64_t R, D, inner;
  ConstRows x, y;  // y: null where nothing is added
  Rows out;
  const void* weights;  // packed
  bool rest;
};

// False where the driver makes no maps of the operands.
template <class Op>
bool set_hopper_task(HopperTask<Op>& task, const Op& op, const HopperOperands& operands) {
  const auto [R, D, inner, x, y, out, weights, rest] = operands;
  const bool adds_y = y.data != nullptr;
  const bool is_mapped = map_tiles(task.x, x.dtype, x, R, D, kGroupRows) &&
                         map_tiles(task.y, x.dtype, adds_y ? y : x, R, D, kGroupRows) &&
                         map_tiles(task.out, x.dtype, {out.data, D, out.dtype}, R, D, kWarpRows);
  task.weights = weights;
  task.R = R;
  task.D = static_cast<int>(D);
  task.passes = rest ? 2 : 1;
  task.adds_y = adds_y;
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
