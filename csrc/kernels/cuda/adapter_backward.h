// The gradients of the adapter's rows.
#pragma once
#include "kernels/cuda/adapter_forward.h"

namespace petl::cuda {

// What the normalization's backward needs of the weights alone, for each hidden unit b.
struct NormTerms {
  float* mean_weight;  // [B], mean over d of norm_weight[d] down[b, d]
  float* bias;         // [B], what both biases give the hidden unit: norm_bias down[b]^T + down_bias[b]
};

// From dout to dx, the left operands of the weights' gradients, and a share of dgain per block of rows:
//
//     dhidden = scale (dout up) act'(hidden)    dnormalized = dhidden down    dx = what LayerNorm makes of it (+ dout)
//
// LayerNorm's backward needs two sums over a row of dnormalized, mean(w dnormalized) and mean(w dnormalized
// normalized). Both follow from dhidden before the second product: sum_b dhidden[b] mean_weight[b], and sum_b
// dhidden[b] products[b] / D. The products are kept without the biases, which may be far greater.
template <class T>
struct AdapterBackwardOp {
  using Element = T;
  static constexpr Order kFirstOrder = Order::depth, kSecondOrder = Order::depth;
  static constexpr bool kSplits = false, kTransforms = false;
  static constexpr int most_resident_blocks(int) { return 2; }

  const T* left;  // dout
  int64_t left_stride;
  Weights first;   // up
  Weights second;  // down
  int64_t R;
  int D, inner;
  AdapterActivation activation;
  Norm norm;
  const float* mean_weight;  // see NormTerms
  Weights up_bias;
  Scale scale;
  const T* x;
  int64_t x_stride;
  const RowStatistics* statistics;  // [R]
  bool residual_is_input;
  T* dx;
  const float* hidden_products;  // [R, kept], of normalized x with down
  Weights hidden_bias;           // [1, B], which makes the hidden units of them
  T* hidden;                     // [R, kept], after the activation; null: no weight has a gradient
  T* dhidden;                    // [R, kept], likewise
  int kept;
  double* shares;  // of dgain, one per block of rows; null: not wanted

  struct Terms {
    RowStatistics statistics[kMaxThreadRows];
    float mean[kMaxThreadRows], slope[kMaxThreadRows];
    double share;
  };
  struct Inputs {
    Packed<T> dout, x;
  };

  template <class Block>
  __device__ __forceinline__ void begin(const Block&) const {}
  __device__ __forceinline__ bool splits() const { return false; }
  __device__ __forceinline__ bool writes_rows() const { return dx || shares; }
  __device__ __forceinline__ bool multiplies() const { return dx; }

  template <class Block, class SumsOfThread>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Tile<T> tile) const {
    const float factor = scale.value();
    Terms terms = {};
    block.for_each(sums, inner, [&](int line, int column, float (&gradients)[8]) {
      const bool valid = column < kept && block.row(line) < R;
      const int64_t place = block.row(line) * kept + column;
      float units[8], bias[8];
      unpack(load_if(valid, hidden_products + place), units);
      load_row(hidden_bias, column, bias);
      float sum = 0, mean = 0, slope = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool inside = column + i < inner;
        const ActivationValue unit = cuda::activate(activation, units[i] + bias[i]);
        sum += inside ? gradients[i] * unit.value : 0;
        gradients[i] = inside ? factor * gradients[i] * unit.derivative : 0;
        if (norm.exists() && inside) {
          mean += gradients[i] * mean_weight[column + i];
          slope += gradients[i] * units[i];
        }
        units[i] = unit.value;
      }
      terms.mean[line] += mean;
      terms.slope[line] += slope / static_cast<float>(D);
      terms.share += double{scale.factor} * sum;
      const Packed<T> packed = pack<T>(gradients);
      store(tile.data + block.local_row(line) * tile.stride + column, packed);
      if (!valid || !dhidden) return;
      store(dhidden + place, packed);
      store(hidden + place, pack<T>(units));
    });
    if (!norm.exists()) return terms;
    block.reduce_rows(terms.mean, Add());
    block.reduce_rows(terms.slope, Add());
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      if (block.row(line) < R) terms.statistics[line] = statistics[block.row(line)];
    }
    return terms;
  }

  __device__ __forceinline__ Inputs prefetch(int64_t row, int column) const {
    Inputs inputs = {};
    if (residual_is_input || shares) inputs.dout = load(left + row * left_stride + column);
    if (norm.exists() && dx) inputs.x = load(x + row * x_stride + column);
    return inputs;
  }

  __device__ __forceinline__ void write(int64_t row, int column, const float (&products)[8], const Inputs& inputs,
                                        const Terms& terms, int line, double& share) const {
    float dout[8];
    unpack(inputs.dout, dout);
    if (shares) share += double{scale.factor} * dot_up_bias(dout, column);
    if (!dx) return;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = products[i];
    if (norm.exists()) {
      float x_values[8], weight[8];
      unpack(inputs.x, x_values);
      load_row(norm.weight, column, weight);
      const RowStatistics& row_values = terms.statistics[line];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float normalized = row_values.normalized(x_values[i]);
        values[i] = row_values.inverse * (weight[i] * values[i] - terms.mean[line] - normalized * terms.slope[line]);
      }
    }
    if (residual_is_input) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += dout[i];
    }
    store(dx + row * D + column, pack<T>(values));
  }

  __device__ __forceinline__ float dot_up_bias(const float (&dout)[8], int column) const {
    float bias[8], sum = 0;
    load_row(up_bias, column, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += dout[i] * bias[i];
    return sum;
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block& block, const Terms& terms, double share) const {
    if (!shares) return;
    const double total = sum_block(terms.share + share, block.block_scratch);
    if (threadIdx.x == 0) shares[blockIdx.x] = total;
  }
};

}  // namespace petl::cuda
