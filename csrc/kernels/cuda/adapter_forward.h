// The adapter's rows in forward, and what backward needs of them again.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/cuda/sandwich.h"

namespace petl::cuda {

// scale * gain, which is a number in device memory or nothing.
struct Scale {
  float factor;
  const void* gain;
  DType gain_dtype;

  __device__ __forceinline__ float value() const { return gain ? factor * load_scalar(gain, gain_dtype, 0) : factor; }
};

struct Norm {
  Weights weight, bias;  // [1, D]; null data: none
  float epsilon;

  __device__ __forceinline__ bool exists() const { return weight.data != nullptr; }
};

__device__ __forceinline__ void load_row(const Weights& row, int column, float (&values)[8]) {
  unpack(row.load(0, column), row.dtype, values);
}

// out = residual + scale (act(norm(x) down^T + down_bias) up^T + up_bias); or, where out is null, the products
// norm(x) down^T, which are to come without the norm's bias, and the rows' statistics, for backward.
template <class T>
struct AdapterForwardOp {
  using Element = T;
  static constexpr Order kFirstOrder = Order::columns, kSecondOrder = Order::columns;
  static constexpr bool kSplits = false, kTransforms = true;
  static constexpr int most_resident_blocks(int) { return 3; }

  const T* left;  // x
  int64_t left_stride;
  Weights first;   // down
  Weights second;  // up
  int64_t R;
  int D, inner;
  AdapterActivation activation;
  Norm norm;
  Weights down_bias, up_bias;  // [1, B], [1, D]
  Scale scale;
  const T* residual;  // null: none
  int64_t residual_stride;
  T* out;
  float* hidden_products;     // [R, kept]
  RowStatistics* statistics;  // [R]
  int kept;

  struct Terms {
    float scale;
  };
  using Inputs = Packed<T>;  // of the residual

  __device__ __forceinline__ bool splits() const { return false; }
  __device__ __forceinline__ bool transforms() const { return norm.exists(); }
  __device__ __forceinline__ bool writes_rows() const { return out; }
  __device__ __forceinline__ bool multiplies() const { return true; }

  template <class Block>
  __device__ __forceinline__ void begin(const Block& block) const {
    if (!norm.exists()) return;
    constexpr int kTogether = 4;
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int row = kTogether * block.warp(); row < Block::kRows; row += kTogether * warps) {
      const int64_t first = block.first_row() + row;
      if (first >= R) break;
      RowStatistics values[kTogether];
      const int rows = static_cast<int>(R - first < kTogether ? R - first : kTogether);
      find_statistics(left + first * left_stride, left_stride, rows, D, norm.epsilon, values);
      if (threadIdx.x % 32 != 0) continue;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (i >= rows) break;
        block.row_statistics[row + i] = values[i];
        if (statistics) statistics[first + i] = values[i];
      }
    }
    __syncthreads();
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block&, const Terms&, double) const {}

  __device__ __forceinline__ void transform(float (&values)[8], const RowStatistics& row, int column) const {
    float weight[8], bias[8];
    load_row(norm.weight, column, weight);
    load_row(norm.bias, column, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = row.normalized(values[i]) * weight[i] + bias[i];
  }

  template <class Block, class SumsOfThread>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Tile<T> hidden) const {
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
      if (hidden_products && column < kept && block.row(line) < R) {
        store(hidden_products + block.row(line) * kept + column, pack<float>(values));
      }
      float bias[8];
      load_row(down_bias, column, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = column + i < inner ? cuda::activate(activation, values[i] + bias[i]).value : 0;
      }
      store(hidden.data + block.local_row(line) * hidden.stride + column, pack<T>(values));
    });
    return {scale.value()};
  }

  __device__ __forceinline__ Inputs prefetch(int64_t row, int column) const {
    return load_if(residual != nullptr, residual + row * residual_stride + column);
  }

  __device__ __forceinline__ void write(int64_t row, int column, const float (&products)[8], const Inputs& inputs,
                                        const Terms& terms, int, double&) const {
    float values[8], bias[8];
    unpack(inputs, values);
    load_row(up_bias, column, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += terms.scale * (products[i] + bias[i]);
    store(out + row * D + column, pack<T>(values));
  }
};

}  // namespace petl::cuda
