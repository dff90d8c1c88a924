// Packs weights for the Hopper path, from any dtype, by the launch of packing.h.
#pragma once
#include "kernels/cuda/hopper_layout.h"
#include "kernels/cuda/packing.h"

namespace petl::cuda {

// Inner columns are rows of `source` (Order::columns for first weights, Order::depth for second ones), or its columns.
struct HopperWeights {
  Weights source;
  Order order;
  Weights gain = {};  // as in PackedOperand, of first weights in Order::columns
};

// All products' weights, and what else an op packs beside them.
template <class OpRows>
struct HopperPacking {
  HopperWeights first[2], second;
  int firsts;
  int D, inner;  // inner: as the shape has it
  bool rest;     // of first[0], in the place of first[1]
  void* target;
  OpRows rows;

  __host__ __device__ int tile_elements() const { return inner * kHopperChunk; }
  __host__ __device__ int chunks() const { return D / kHopperChunk; }
  __host__ __device__ int passes() const { return firsts + (rest ? 1 : 0); }
  // Of one pass over D, by 8 elements for each thread.
  __host__ __device__ int blocks_of_pass() const { return chunks() * tile_elements() / (8 * kPackThreads); }
  __host__ __device__ int blocks_of_weights() const { return (passes() + 1) * blocks_of_pass(); }
  int blocks() const { return blocks_of_weights() + rows.blocks(); }

  template <class T>
  __device__ __forceinline__ void run(int block) const {
    const int pass = block / blocks_of_pass();
    if (block >= blocks_of_weights()) return rows.template run<T>(block - blocks_of_weights());
    const int element = (block % blocks_of_pass() * kPackThreads + static_cast<int>(threadIdx.x)) * 8;
    float values[8];
    if (pass < passes()) {
      load_first<T>(first[rest ? 0 : pass], element, values);
      if (rest && pass == 1) subtract_rounded(pack<T>(values), values);
    } else {
      load_second(element, values);
    }
    T* const tiles = static_cast<T*>(target) + int64_t{pass} * chunks() * tile_elements();
    store(tiles + element, pack<T>(values));
  }

 private:
  template <class T>
  __device__ __forceinline__ void load_first(const HopperWeights& weights, int element, float (&values)[8]) const {
    const Weights& gain = weights.gain;
    const bool has_gain = gain.data != nullptr;
    const float scale = has_gain ? gain_scale<T>(gain, reinterpret_cast<float*>(shared_memory())) : 1;
    const int plain = swizzled_element(element % tile_elements(), kHopperChunk);
    const int column = element / tile_elements() * kHopperChunk + plain % kHopperChunk;
    const int unit = unit_of(inner, plain / kHopperChunk);
    if (weights.order == Order::depth) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = load_element(weights.source, column + i, unit);
      return;
    }
    unpack(weights.source.load(unit, column), weights.source.dtype, values);
    if (!has_gain) return;
    float gains[8];
    unpack(gain.load(0, column), gain.dtype, gains);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= gains[i] * scale;
  }

  __device__ __forceinline__ void load_second(int element, float (&values)[8]) const {
    const int of_tile = element % tile_elements();
    const Piece piece = piece_with(inner, of_tile / kHopperChunk);
    const int plain = swizzled_element(of_tile - piece.first * kHopperChunk, piece.width);
    const int column = element / tile_elements() * kHopperChunk + plain / piece.width;
    const bool by_depth = second.order == Order::depth;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int unit = unit_of(inner, piece.first + plain % piece.width + i);
      values[i] = load_element(second.source, by_depth ? unit : column, by_depth ? column : unit);
    }
  }

  __device__ __forceinline__ static float load_element(const Weights& source, int row, int column) {
    const bool is_there = row < source.rows && column < source.columns;
    return is_there ? load_scalar(source.data, source.dtype, row * source.stride + column) : 0;
  }
};

template <class T, class OpRows>
int launch_hopper_packing(Queue queue, const HopperPacking<OpRows>& packing) {
  PackTask<HopperPacking<OpRows>> task = {};
  task.rows = packing;
  return launch_packing<T>(queue, task);
}

}  // namespace petl::cuda
