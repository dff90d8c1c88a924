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
// Sums dout up_bias^T of the block's rows, which is their bias' share of dgain.
template <class Op, class Copy>
class BiasShare {
 public:
  template <class Block>
  __device__ __forceinline__ BiasShare(const Op& op, const Block& block) : op_(op), rows_(block.rows) {}

  __device__ __forceinline__ bool wants(int column) const { return op_.shares && column < op_.D; }

  template <class T>
  __device__ __forceinline__ void look(const T* vector, int copy, int column) {
    constexpr int kValues = 16 / sizeof(T);
    if (Copy::row() + copy * Copy::kRowStep >= rows_) return;
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum_ = fmaf(to_float(vector[i]), op_.vectors.up_bias[column + i], sum_);
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block&) const {}
  __device__ __forceinline__ double share() const { return sum_; }

 private:
  const Op& op_;
  const int rows_;
  float sum_ = 0;
};

template <class T>
struct AdapterBackwardOp {
  using Element = T;
  static constexpr bool kRest = false, kWritesRows = true;
  static constexpr int most_resident_blocks(int) { return 2; }
  template <class Copy>
  using Watch = BiasShare<AdapterBackwardOp, Copy>;

  const T* left;  // dout
  int64_t left_stride;
  const T *first, *second;  // up, down
  int64_t R;
  int D, inner;
  AdapterActivation activation;
  Dropout dropout;
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
    const RowStatistics* statistics;  // of the thread's first line, in shared memory
    float mean[kMaxThreadRows], slope[kMaxThreadRows];
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
    EightFloats weight;

    __device__ __forceinline__ Columns(const AdapterBackwardOp& op, int column)
        : weight(op.vectors.norm_weight + column) {}
  };

  __device__ __forceinline__ bool writes_rows() const { return dx; }
  __device__ __forceinline__ bool multiplies() const { return true; }

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Hidden tile, double& share) const {
    Terms terms = {};
    const float factor = scale.value();
    with_dropout(dropout, [&](const auto& drop) {
      with_activation(activation, [&](auto kind) {
        block.for_each_group(inner, [&](int group, int column) {
          const EightFloats biases(vectors.biases + column), weights(vectors.mean_weight + column);
#pragma unroll
          for (int line = 0; line < Block::kThreadRows; ++line) {
            const auto kept_units = drop.kept(block.row(line), column);
            float gradients[8], units[8];
            sums.get(group, line, gradients);
            kept_units.apply(gradients);
            differentiate<decltype(kind)::value>(block, line, column, biases, weights, factor, gradients, units, terms,
                                                 share);
            kept_units.apply(units);
            const Packed<T> packed = pack<T>(gradients);
            tile.store(block.local_row(line), column, packed);
            const bool kept_here = (dhidden != nullptr) & (column < kept) & block.has(line);
            const int64_t place = block.row(0) * kept + line * (int64_t{8} * kept) + column;
            store_if(kept_here, dhidden + place, packed);
            store_if(kept_here, hidden + place, pack<T>(units));
          }
        });
      });
    });
    block.reduce_rows(terms.mean, Add());
    block.reduce_rows(terms.slope, Add());
    terms.statistics = block.row_statistics + block.local_row(0);
    for (int row = threadIdx.x; row < block.rows; row += blockDim.x) {
      block.row_statistics[row] = statistics[block.first_row() + row];
    }
    // The second product's first barrier is between these and their readers.
    return terms;
  }

  // From the gradients of eight hidden units after the activation to those before it; `units` become the hidden units.
  template <AdapterActivation kActivation, class Block>
  __device__ __forceinline__ void differentiate(const Block& block, int line, int column, const EightFloats& biases,
                                                const EightFloats& weights, float factor, float (&gradients)[8],
                                                float (&units)[8], Terms& terms, double& share) const {
    const bool valid = column < kept && block.has(line);
    unpack(load_if(valid, products + block.row(0) * kept + line * (int64_t{8} * kept) + column), units);
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
    share += sum;
  }

  __device__ __forceinline__ Inputs prefetch(bool valid, const Rows& rows, int line, int column) const {
    return {load_if(valid & residual_is_input, rows.dout.at(line, column)),
            load_if(valid & (x != nullptr), rows.x.at(line, column))};
  }

  __device__ __forceinline__ void write(bool valid, const Rows& rows, int line, int column, const float (&products)[8],
                                        const Inputs& inputs, const Columns& columns, const Terms& terms,
                                        float&) const {
    float dout[8], values[8];
    unpack(inputs.dout, dout);
    unpack(inputs.x, values);
    const RowStatistics row = terms.statistics[8 * line];
    const float slope = -row.inverse * terms.slope[line];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float centered = values[i] - row.mean - row.mean_rest;
      const float gradient = fmaf(slope, centered, fmaf(columns.weight.values[i], products[i], -terms.mean[line]));
      values[i] = fmaf(row.inverse, gradient, dout[i]);
    }
    store_if(valid, rows.dx.at(line, column), pack<T>(values));
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block& block, double share) const {
    if (!shares) return;
    const double total = sum_block(double{scale.factor} * share, block.block_scratch);
    if (threadIdx.x == 0) shares[blockIdx.x] = total;
  }
};

}  // namespace petl::cuda
