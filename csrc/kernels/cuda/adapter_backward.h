// The gradients of the adapter's rows.
#pragma once
#include "kernels/cuda/adapter_forward.h"

namespace petl::cuda {

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
  static constexpr bool kRest = false, kWritesRows = true;
  static constexpr int most_resident_blocks(int) { return 2; }
  template <class>
  using Watch = NoWatch;

  const T* left;  // dout
  int64_t left_stride;
  const T *first, *second;  // up, down
  int64_t R;
  int D, inner;
  AdapterActivation activation;
  AdapterVectors vectors;
  Scale scale;
  const T* x;  // null: not normalized
  int64_t x_stride;
  const RowStatistics* statistics;  // [R], those of rows that are not normalized change nothing
  bool residual_is_input;
  T* dx;
  const float* products;  // [R, kept], of normalized x with down
  T* hidden;              // [R, kept], after the activation; null: no weight has a gradient
  T* dhidden;             // [R, kept], likewise
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

  struct Rows {
    RowWalk<const T> dout, x;
    RowWalk<T> dx;

    __device__ __forceinline__ Rows(const AdapterBackwardOp& op, int64_t row, int column)
        : dout(RowWalk<const T>::from(op.left, op.left_stride, row, column)),
          x(RowWalk<const T>::from(op.x, op.x_stride, row, column)),
          dx(RowWalk<T>::from(op.dx, op.D, row, column)) {}
    __device__ __forceinline__ void advance(int columns) {
      dout.first += columns;
      x.first += columns;
      dx.first += columns;
    }
  };

  struct Columns {
    EightFloats weight, bias;

    __device__ __forceinline__ Columns(const AdapterBackwardOp& op, int column)
        : weight(op.vectors.norm_weight + column), bias(op.vectors.up_bias + column) {}
  };

  __device__ __forceinline__ bool writes_rows() const { return dx || shares; }
  __device__ __forceinline__ bool multiplies() const { return dx; }

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Hidden tile) const {
    Terms terms = {};
    const float factor = scale.value();
    with_activation(activation, [&](auto kind) {
      block.for_each_group(inner, [&](int group, int column) {
        const EightFloats biases(vectors.biases + column), weights(vectors.mean_weight + column);
#pragma unroll
        for (int line = 0; line < Block::kThreadRows; ++line) {
          float gradients[8], units[8];
          sums.get(group, line, gradients);
          differentiate<decltype(kind)::value>(block, line, column, biases, weights, factor, gradients, units, terms);
          const Packed<T> packed = pack<T>(gradients);
          tile.store(block.local_row(line), column, packed);
          const bool kept_here = dhidden && column < kept && block.has(line);
          const int64_t place = block.row(line) * kept + column;
          store_if(kept_here, dhidden + place, packed);
          store_if(kept_here, hidden + place, pack<T>(units));
        }
      });
    });
    if (!x) {
#pragma unroll
      for (RowStatistics& row : terms.statistics) row = {0, 0, 1};
      return terms;
    }
    block.reduce_rows(terms.mean, Add());
    block.reduce_rows(terms.slope, Add());
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      if (block.has(line)) terms.statistics[line] = statistics[block.row(line)];
    }
    return terms;
  }

  // From the gradients of eight hidden units after the activation to those before it; `units` become the hidden units.
  template <AdapterActivation kActivation, class Block>
  __device__ __forceinline__ void differentiate(const Block& block, int line, int column, const EightFloats& biases,
                                                const EightFloats& weights, float factor, float (&gradients)[8],
                                                float (&units)[8], Terms& terms) const {
    const bool valid = column < kept && block.has(line);
    unpack(load_if(valid, products + block.row(line) * kept + column), units);
    float sum = 0, slope = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool inside = valid && column + i < inner;
      const ActivationValue unit = cuda::activate<kActivation>(units[i] + biases.values[i]);
      sum += inside ? gradients[i] * unit.value : 0;
      gradients[i] = inside ? factor * gradients[i] * unit.derivative : 0;
      terms.mean[line] += gradients[i] * weights.values[i];
      slope += gradients[i] * units[i];
      units[i] = unit.value;
    }
    terms.slope[line] += x ? slope / static_cast<float>(D) : 0;
    terms.share += sum;
  }

  __device__ __forceinline__ Inputs prefetch(bool valid, const Rows& rows, int line, int column) const {
    return {load_if(valid && (residual_is_input || shares), rows.dout.at(line, column)),
            load_if(valid && x && dx, rows.x.at(line, column))};
  }

  __device__ __forceinline__ void write(bool valid, const Rows& rows, int line, int column, const float (&products)[8],
                                        const Inputs& inputs, const Columns& columns, const Terms& terms,
                                        float& share) const {
    float dout[8], values[8];
    unpack(inputs.dout, dout);
    unpack(inputs.x, values);
    const RowStatistics& row = terms.statistics[line];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      share += dout[i] * columns.bias.values[i];
      const float slope = row.normalized(values[i]) * terms.slope[line];
      values[i] = row.inverse * (columns.weight.values[i] * products[i] - terms.mean[line] - slope) +
                  (residual_is_input ? dout[i] : 0);
    }
    store_if(valid && dx, rows.dx.at(line, column), pack<T>(values));
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block& block, const Terms& terms, double share) const {
    if (!shares) return;
    const double total = sum_block(double{scale.factor} * (terms.share + share), block.block_scratch);
    if (threadIdx.x == 0) shares[blockIdx.x] = total;
  }
};

}  // namespace petl::cuda
