// Prompt diffusion's rows in forward.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/sandwich.h"

namespace petl::cuda {

__device__ __forceinline__ float masked(bool valid, float value) { return valid ? value : 0.0f; }

// What scores are kept in: see kept_dtype in ops/apt.cpp.
template <class T>
struct KeptOf {
  using Type = float;
};
template <>
struct KeptOf<Bfloat16> {
  using Type = Bfloat16;
};

// out = exp(log_scale) (y + gate (scores prompts)), scores = act(x keys^T).
//
// What meets the prompts is scores / gate, which lies in [0, 1] whatever the scores are, so that float16 cannot
// overflow; the other factor gate comes at the end.
template <class T>
struct AptForwardOp {
  using Element = T;
  using Kept = typename KeptOf<T>::Type;
  static constexpr Order kFirstOrder = Order::columns, kSecondOrder = Order::depth;
  static constexpr bool kSplits = sizeof(T) == 2, kTransforms = false;
  static constexpr int most_resident_blocks(int) { return 3; }

  const T* left;  // x
  int64_t left_stride;
  Weights first;   // keys
  Weights second;  // prompts
  int64_t R;
  int D, inner;
  Activation activation;
  const void* log_scale;
  DType log_scale_dtype;
  const T* y;
  int64_t y_stride;
  T* out;
  float* gate;
  Kept* scores;  // [R, kept]; null: not kept
  int kept;

  // exp(log_scale), and what the products are multiplied by
  struct Terms {
    float scale, factor[kMaxThreadRows];
  };
  using Inputs = Packed<T>;

  template <class Block>
  __device__ __forceinline__ void begin(const Block&) const {}
  template <class Block>
  __device__ __forceinline__ void end(const Block&, const Terms&, double) const {}
  __device__ __forceinline__ bool writes_rows() const { return true; }
  __device__ __forceinline__ bool multiplies() const { return true; }
  // Rounded keys flip the ReLU's mask: the product takes what rounding leaves out as well. Softmax has no mask.
  __device__ __forceinline__ bool splits() const {
    return activation == Activation::relu && first.dtype == DType::float32;
  }

  // Finds the gates. For softmax the raw scores become scores / gate, the exponentials; for ReLU they stay as they are.
  template <class Block, class SumsOfThread>
  __device__ __forceinline__ void activate_rows(SumsOfThread& sums, const Block& block,
                                                float (&gates)[Block::kThreadRows]) const {
    float best[Block::kThreadRows];
#pragma unroll
    for (float& value : best) value = -INFINITY;
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i < inner) best[line] = Max()(best[line], values[i]);
      }
    });
    block.reduce_rows(best, Max());
    if (activation == Activation::relu) {
#pragma unroll
      for (int line = 0; line < Block::kThreadRows; ++line) gates[line] = best[line] < 0 ? 0 : best[line];
      return;
    }
    float total[Block::kThreadRows] = {};
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = masked(column + i < inner, expf(values[i] - best[line]));
        total[line] += values[i];
      }
    });
    block.reduce_rows(total, Add());
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) gates[line] = 1 / total[line];
  }

  template <class Block, class SumsOfThread>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Tile<T> hidden) const {
    float gates[Block::kThreadRows], inverse[Block::kThreadRows];
    activate_rows(sums, block, gates);
    const bool relu = activation == Activation::relu;
    Terms terms;
    terms.scale = expf(load_scalar(log_scale, log_scale_dtype, 0));
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      // Below the smallest normal float gate^2 is zero, and so is what the inverse would be multiplied by. A NaN comes
      // through the factor.
      inverse[line] = gates[line] >= 1.2e-38f ? 1 / gates[line] : 0;
      terms.factor[line] = terms.scale * gates[line] * gates[line];
      if (block.column_warp() == 0 && threadIdx.x % 4 == 0 && block.row(line) < R) gate[block.row(line)] = gates[line];
    }
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
      float normalized[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // Written so that a NaN stays one.
        const float value = relu && values[i] < 0 ? 0 : masked(column + i < inner, values[i]);
        values[i] = relu ? value : value * gates[line];
        normalized[i] = relu ? value * inverse[line] : value;
      }
      store(hidden.data + block.local_row(line) * hidden.stride + column, pack<T>(normalized));
      if (scores && column < kept && block.row(line) < R) {
        store(scores + block.row(line) * kept + column, pack<Kept>(values));
      }
    });
    return terms;
  }

  __device__ __forceinline__ Inputs prefetch(int64_t row, int column) const {
    return load(y + row * y_stride + column);
  }

  __device__ __forceinline__ void write(int64_t row, int column, const float (&products)[8], const Inputs& inputs,
                                        const Terms& terms, int line, double&) const {
    float values[8];
    unpack(inputs, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = terms.scale * values[i] + terms.factor[line] * products[i];
    store(out + row * D + column, pack<T>(values));
  }
};

}  // namespace petl::cuda
