// Weights on their way from device memory to shared memory. They come in any dtype, and are rounded to the dtype of the
// products only here: so no launch before the kernel has to, and every block of threads reads them as they are.
#pragma once
#include "kernels/cuda/elements.h"

namespace petl::cuda {

// How a product's right operand [depth, columns] lies in its tensor.
enum class Order {
  columns,  // rows of the tensor are columns of the operand: keys [P, D] in x keys^T
  depth,    // rows of the tensor are rows of the operand: prompts [P, D] in scores prompts
};

struct Weights {
  const void* data;
  int64_t stride;
  DType dtype;
  bool aligned;  // every eight elements from a multiple of eight on lie in whole 16-byte words
  int rows, columns;

  __device__ __forceinline__ AnyPacked load(int row, int column) const {
    AnyPacked packed = {};
    if (row >= rows || column >= columns) return packed;
    const int64_t begin = row * stride + column;
    if (!aligned || column + 8 > columns) {
      load_part(begin, min(8, columns - column), packed);
    } else if (dtype == DType::float32) {
      packed.words[0] = reinterpret_cast<const uint4*>(static_cast<const float*>(data) + begin)[0];
      packed.words[1] = reinterpret_cast<const uint4*>(static_cast<const float*>(data) + begin)[1];
    } else {
      packed.words[0] = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + begin)[0];
    }
    return packed;
  }

 private:
  // Element by element. The loop is not unrolled: this is rare, and would fill the instruction cache.
  __device__ __forceinline__ void load_part(int64_t begin, int count, AnyPacked& packed) const {
    uint32_t words[8] = {};
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const bool valid = i < count;
      if (dtype == DType::float32) {
#pragma unroll
        for (int j = 0; j < 7; ++j) words[j] = words[j + 1];
        words[7] = valid ? static_cast<const uint32_t*>(data)[begin + i] : 0;
      } else {
#pragma unroll
        for (int j = 0; j < 3; ++j) words[j] = words[j] >> 16 | words[j + 1] << 16;
        const uint32_t bits = valid ? static_cast<const uint16_t*>(data)[begin + i] : 0;
        words[3] = words[3] >> 16 | bits << 16;
      }
    }
    packed.words[0] = {words[0], words[1], words[2], words[3]};
    packed.words[1] = {words[4], words[5], words[6], words[7]};
  }
};

// Where column `column` of a right operand lies in shared memory. Within 32 columns they are dealt out so that a
// thread's sums of four neighboring 8-column blocks belong to eight neighboring columns, which it can store at once:
// column 8 t + 2 q + i lies in slot 8 q + 2 t + i, where lane 4 g + t has its sums of block q.
__device__ __forceinline__ int slot_of(int column) {
  return (column & ~31) | (column & 6) << 2 | (column >> 2 & 6) | (column & 1);
}

// A tile [kDepth, kColumns] of a right operand: read into registers, then written to shared memory in T, as
// [slot][depth] for Order::columns and [depth][slot] for Order::depth.
template <class T, Order kOrder, int kDepth, int kColumns, int kThreads>
class WeightStage {
 public:
  static constexpr int kPadding = 16 / sizeof(T);  // lets rows begin in different banks
  static constexpr int kStride = (kOrder == Order::columns ? kDepth : kColumns) + kPadding;
  static constexpr int kElements = (kOrder == Order::columns ? kColumns : kDepth) * kStride;

  __device__ __forceinline__ void load(const Weights& weights, int depth, int column) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const Place place = place_of(i);
      packed_[i] = kOrder == Order::columns ? weights.load(column + place.row, depth + place.column)
                                            : weights.load(depth + place.row, column + place.column);
    }
  }

  // `rest`, if not null, takes what rounding leaves out.
  __device__ __forceinline__ void store(const Weights& weights, T* tile, T* rest) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float values[8];
      unpack(packed_[i], weights.dtype, values);
      const Packed<T> rounded = pack<T>(values);
      store_vector(tile, place_of(i), rounded);
      if (rest == nullptr) continue;
      subtract_rounded(rounded, values);
      store_vector(rest, place_of(i), pack<T>(values));
    }
  }

 private:
  static constexpr int kRowVectors = (kOrder == Order::columns ? kDepth : kColumns) / 8;
  static constexpr int kVectors = kDepth * kColumns / 8 / kThreads;
  static_assert(kVectors * kThreads * 8 == kDepth * kColumns, "every thread takes as many vectors");

  struct Place {
    int row, column;
  };

  __device__ __forceinline__ static Place place_of(int i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x);
    return {vector / kRowVectors, vector % kRowVectors * 8};
  }

  __device__ __forceinline__ static void store_vector(T* tile, Place place, const Packed<T>& packed) {
    if constexpr (kOrder == Order::columns) {
      cuda::store(tile + slot_of(place.row) * kStride + place.column, packed);
    } else {
      // Neighboring columns 2 q and 2 q + 1 stay neighbors; the pairs go to four different blocks.
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const auto pair = pair_of(packed, q);
        T* target = tile + place.row * kStride + slot_of(place.column + 2 * q);
        *reinterpret_cast<decltype(pair_of(packed, q))*>(target) = pair;
      }
    }
  }

  AnyPacked packed_[kVectors];
};

}  // namespace petl::cuda
