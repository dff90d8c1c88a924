// Weights as they lie in device memory, in any dtype.
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

}  // namespace petl::cuda
