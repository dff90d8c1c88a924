// The weights of a call as its kernels copy them: rounded to the dtype of the products, cut into the tiles that are
// multiplied between two barriers, padded with zeros. One small launch makes them, from any dtype; else every block of
// threads would have to round them anew.
#pragma once
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

constexpr int kUnitColumns = 32;

// How a right operand [depth, columns] is cut: into units of 32 columns and some depth, 64 at most, each [slot][depth].
// A tile is `groups` units beside each other; the tiles follow each other along the depth, `depths` of them, and then
// along the columns.
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

// One unit of an operand, by a block of kPackThreads. Each thread makes eight of a column's elements at a time.
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
    if (operand_.order == Order::columns) {
      pack_columns();
    } else {
      load_rows();
      __syncthreads();
      for_each_vector([&](int column, int depth) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = values_[place_of(column, depth + i)];
        store_eight(column, depth, values);
      });
    }
  }

  static constexpr int kColumnStride = 97, kSharedBytes = kUnitColumns * kColumnStride * sizeof(float);

 private:
  // Neither eight rows of eight columns nor eight depths of four columns meet in a bank.
  __device__ __forceinline__ static int place_of(int column, int depth) {
    return column * kColumnStride + depth + depth / 32 * 4;
  }

  template <class Visit>
  __device__ __forceinline__ void for_each_vector(Visit visit) const {
    const int vectors = operand_.unit_depth / 8;
    for (int i = threadIdx.x; i < kUnitColumns * vectors; i += kPackThreads) visit(i / vectors, i % vectors * 8);
  }

  // Rows of the tensor are columns of the operand.
  __device__ __forceinline__ void pack_columns() const {
    const bool has_gain = operand_.gain.data != nullptr;
    const float scale = has_gain ? gain_scale<T>(operand_.gain, values_) : 1;
    for_each_vector([&](int column, int depth) {
      float values[8], gain[8];
      unpack(operand_.source.load(column_ + column, depth_ + depth), operand_.source.dtype, values);
      if (has_gain) {
        unpack(operand_.gain.load(0, depth_ + depth), operand_.gain.dtype, gain);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= gain[i] * scale;
      }
      store_eight(column, depth, values);
    });
  }

  // Rows of the tensor are rows of the operand.
  __device__ __forceinline__ void load_rows() const {
    constexpr int kVectors = kUnitColumns / 8;
    for (int i = threadIdx.x; i < operand_.unit_depth * kVectors; i += kPackThreads) {
      const int depth = i / kVectors, column = i % kVectors * 8;
      float values[8];
      unpack(operand_.source.load(depth_ + depth, column_ + column), operand_.source.dtype, values);
#pragma unroll
      for (int j = 0; j < 8; ++j) values_[place_of(column + j, depth)] = values[j];
    }
  }

  __device__ __forceinline__ void store_eight(int column, int depth, float (&values)[8]) const {
    const int unit = kUnitColumns * operand_.unit_depth;
    T* const target = static_cast<T*>(operand_.target) +
                      (int64_t{tile_} * (operand_.rest ? 2 : 1) * operand_.cut.groups + group_) * unit +
                      slot_of(column) * operand_.unit_depth + depth;
    const Packed<T> rounded = pack<T>(values);
    store(target, rounded);
    if (!operand_.rest) return;
    subtract_rounded(rounded, values);
    store(target + operand_.cut.groups * unit, pack<T>(values));
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
  return launch(queue, {dim3(static_cast<unsigned>(task.blocks())), kPackThreads, UnitPacker<T>::kSharedBytes},
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
