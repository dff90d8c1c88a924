// The weights of a call as its kernels copy them: rounded to the dtype of the products, cut into the tiles that are
// multiplied between two barriers, padded with zeros. One small launch makes them, from any dtype; else every block of
// threads would have to round them anew.
#pragma once
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

constexpr int kUnitColumns = 32, kMostUnitDepth = 64;

// How a right operand [depth, columns] is cut: into units of 32 columns and some depth, each [slot][depth]. A tile is
// `groups` units beside each other; the tiles follow each other along the depth, `depths` of them, and then along the
// columns.
struct Cut {
  int groups, depths, column_tiles;
};

struct PackedOperand {
  Weights source;
  Order order;
  Cut cut;
  int unit_depth;
  bool rest;     // behind each tile lies one of what rounding left out of it
  Weights gain;  // [1, depth], multiplies an operand in Order::columns along its depth; null data: none
  void* target;

  __host__ __device__ int units() const { return cut.groups * cut.depths * cut.column_tiles; }
  int64_t elements() const { return int64_t{units()} * kUnitColumns * unit_depth * (rest ? 2 : 1); }
};

// The column whose place in 32 is `slot`: the inverse of slot_of.
__device__ __forceinline__ int column_of(int slot) { return (slot & 6) << 2 | (slot >> 2 & 6) | (slot & 1); }

// A power of two that brings the largest gain near one. Products of weights with small gains would else have few digits
// in float16, or none.
template <class T>
__device__ __forceinline__ float gain_scale(const Weights&, float*) {
  return 1;
}

template <>
__device__ __forceinline__ float gain_scale<Float16>(const Weights& gain, float* scratch) {
  float greatest = 0;
  for (int column = 8 * threadIdx.x; column < gain.columns; column += 8 * blockDim.x) {
    float values[8];
    unpack(gain.load(0, column), gain.dtype, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) greatest = fmaxf(greatest, fabsf(values[i]));
  }
  greatest = max_block(greatest, scratch);
  const uint32_t exponent = __float_as_uint(greatest) >> 23;
  return exponent == 0 || exponent >= 254 ? 1 : __uint_as_float((254 - exponent) << 23);
}

constexpr int kPackThreads = 128;

// One unit of an operand, by a block of kPackThreads.
template <class T>
class UnitPacker {
 public:
  __device__ __forceinline__ UnitPacker(const PackedOperand& operand, int unit)
      : operand_(operand),
        group_(unit % operand.cut.groups),
        tile_(unit / operand.cut.groups),
        depth_(tile_ % operand.cut.depths * operand.unit_depth),
        column_((tile_ / operand.cut.depths * operand.cut.groups + group_) * kUnitColumns),
        values_(reinterpret_cast<float*>(shared_memory())) {}

  __device__ __forceinline__ void run() const {
    const bool has_gain = operand_.gain.data != nullptr;
    const float scale = has_gain ? gain_scale<T>(operand_.gain, values_) : 1;
    __syncthreads();
    if (operand_.order == Order::columns) {
      load_columns(has_gain, scale);
    } else {
      load_depth();
    }
    __syncthreads();
    store_slots();
  }

 private:
  static constexpr int kStride = kMostUnitDepth + 1;  // lets rows begin in different banks

  // Rows of the tensor are columns of the operand.
  __device__ __forceinline__ void load_columns(bool has_gain, float scale) const {
    const int vectors = operand_.unit_depth / 8;
    for (int i = threadIdx.x; i < kUnitColumns * vectors; i += kPackThreads) {
      const int column = i / vectors, depth = i % vectors * 8;
      float values[8], gain[8];
      unpack(operand_.source.load(column_ + column, depth_ + depth), operand_.source.dtype, values);
      if (has_gain) unpack(operand_.gain.load(0, depth_ + depth), operand_.gain.dtype, gain);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values_[column * kStride + depth + j] = has_gain ? values[j] * (gain[j] * scale) : values[j];
      }
    }
  }

  __device__ __forceinline__ void load_depth() const {
    constexpr int kVectors = kUnitColumns / 8;
    for (int i = threadIdx.x; i < operand_.unit_depth * kVectors; i += kPackThreads) {
      const int depth = i / kVectors, column = i % kVectors * 8;
      float values[8];
      unpack(operand_.source.load(depth_ + depth, column_ + column), operand_.source.dtype, values);
#pragma unroll
      for (int j = 0; j < 8; ++j) values_[(column + j) * kStride + depth] = values[j];
    }
  }

  __device__ __forceinline__ void store_slots() const {
    const int vectors = operand_.unit_depth / 8, unit = kUnitColumns * operand_.unit_depth;
    T* const target = static_cast<T*>(operand_.target) +
                      (int64_t{tile_} * (operand_.rest ? 2 : 1) * operand_.cut.groups + group_) * unit;
    for (int i = threadIdx.x; i < kUnitColumns * vectors; i += kPackThreads) {
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = values_[column_of(i / vectors) * kStride + i % vectors * 8 + j];
      const Packed<T> rounded = pack<T>(values);
      store(target + 8 * i, rounded);
      if (!operand_.rest) continue;
      subtract_rounded(rounded, values);
      store(target + operand_.cut.groups * unit + 8 * i, pack<T>(values));
    }
  }

  const PackedOperand& operand_;
  const int group_, tile_, depth_, column_;
  float* values_;
};

// What an op packs beside its operands: run<T>(block) by the threads of blocks 0 ... blocks() - 1.
struct NoRows {
  int blocks() const { return 0; }
  template <class T>
  __device__ __forceinline__ void run(int) const {}
};

template <class OpRows>
struct PackTask {
  static constexpr int kOperands = 3;
  PackedOperand operands[kOperands];  // of no units: not wanted
  OpRows rows;

  int blocks() const {
    int blocks = rows.blocks();
    for (const PackedOperand& operand : operands) blocks += operand.units();
    return blocks;
  }
};

template <class T, class OpRows>
__global__ void __launch_bounds__(kPackThreads) pack_weights(const __grid_constant__ PackTask<OpRows> task) {
  int block = static_cast<int>(blockIdx.x);
#pragma unroll
  for (int i = 0; i < PackTask<OpRows>::kOperands; ++i) {
    const int units = task.operands[i].units();
    if (block < units) return UnitPacker<T>(task.operands[i], block).run();
    block -= units;
  }
  task.rows.template run<T>(block);
}

template <class T, class OpRows>
int launch_packing(Queue queue, const PackTask<OpRows>& task) {
  const int shared_bytes = kUnitColumns * (kMostUnitDepth + 1) * sizeof(float);
  return launch(queue, {dim3(static_cast<unsigned>(task.blocks())), kPackThreads, shared_bytes},
                &pack_weights<T, OpRows>, task);
}

// Takes room for an operand, and lets it point there.
template <class T>
const T* place_operand(PackedOperand& operand, Partition& partition) {
  T* const target = partition.take<T>(operand.elements());
  operand.target = target;
  return target;
}

}  // namespace petl::cuda
