// The adapter's rows in forward, and what backward needs of them again.
#pragma once
#include "kernels/cuda/activation.h"
#include "kernels/cuda/adapter_norm.h"
#include "kernels/cuda/dropout.h"
#include "kernels/cuda/sandwich.h"

namespace petl::cuda {

// scale * gain, which is a number in device memory or nothing.
struct Scale {
  float factor;
  const void* gain;
  DType gain_dtype;

  __device__ __forceinline__ float value() const { return gain ? factor * load_scalar(gain, gain_dtype, 0) : factor; }
};

// Eight neighboring values of a row of floats.
struct EightFloats {
  float values[8];

  __device__ __forceinline__ explicit EightFloats(const float* source) { unpack(load(source), values); }
};

// What the first product norm(x) down^T takes.
template <class T>
struct AdapterFirst {
  using Element = T;
  static constexpr bool kRest = false;
  static constexpr int most_resident_blocks(int) { return 3; }

  const T* left;  // x
  int64_t left_stride;
  const T *first, *second;  // down, with norm_weight folded in where kFolds; up
  int64_t R;
  int D, inner;
  bool has_norm;
  float epsilon;
  AdapterVectors vectors;
  RowStatistics* statistics;  // [R]; null: not kept

  template <class Copy>
  using Watch = std::conditional_t<kFolds<T>, FindStatistics<AdapterFirst, Copy>, Normalize<AdapterFirst, Copy>>;
};

// The products norm(x) down^T, without the norm's bias, and the rows' statistics, for backward.
template <class T>
struct AdapterProductsOp : AdapterFirst<T> {
  static constexpr bool kWritesRows = false;

  float* products;  // [R, kept]
  int kept;

  template <class Block, class SumsOfThread>
  __device__ __forceinline__ void end(SumsOfThread& sums, const Block& block) const {
    const ProductScale<T, Block::kThreadRows> scale(*this, block);
    block.for_each_group(this->inner, [&](int group, int column) {
      const EightFloats unit_sums(this->vectors.sums + column);
#pragma unroll
      for (int line = 0; line < Block::kThreadRows; ++line) {
        float values[8];
        sums.get(group, line, values);
        scale.apply(line, unit_sums.values, values);
        store_if(column < kept && block.has(line), products + block.row(0) * kept + line * (int64_t{8} * kept) + column,
                 pack<float>(values));
      }
    });
  }
};

// out = residual + scale (act(norm(x) down^T + down_bias) up^T + up_bias).
template <class T>
struct AdapterForwardOp : AdapterFirst<T> {
  static constexpr bool kWritesRows = true;

  AdapterActivation activation;
  Dropout dropout;
  Scale scale;
  const T* residual;  // null: none
  int64_t residual_stride;
  T* out;

  struct Terms {
    float scale;
  };
  using Inputs = Packed<T>;  // of the residual

  struct Rows {
    RowWalk<const T> residual;
    RowWalk<T> out;

    __device__ __forceinline__ Rows(const AdapterForwardOp& op, int64_t row, int column)
        : residual(RowWalk<const T>::from(op.residual, op.residual_stride, row, column)),
          out(RowWalk<T>::from(op.out, op.D, row, column)) {}
    __device__ __forceinline__ void advance(int columns) {
      residual.first += columns;
      out.first += columns;
    }
  };

  struct Columns {
    EightFloats bias;

    __device__ __forceinline__ Columns(const AdapterForwardOp& op, int column) : bias(op.vectors.up_bias + column) {}
  };

  __device__ __forceinline__ bool writes_rows() const { return true; }
  __device__ __forceinline__ bool multiplies() const { return true; }
  template <class Block>
  __device__ __forceinline__ void end(const Block&, double) const {}

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Hidden hidden, double&) const {
    const ProductScale<T, Block::kThreadRows> products(*this, block);
    with_dropout(dropout, [&](const auto& drop) {
      with_activation(activation, [&](auto kind) {
        block.for_each_group(this->inner, [&](int group, int column) {
          const EightFloats unit_sums(this->vectors.sums + column), biases(this->vectors.biases + column);
#pragma unroll
          for (int line = 0; line < Block::kThreadRows; ++line) {
            float values[8];
            sums.get(group, line, values);
            products.apply(line, unit_sums.values, values);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              values[i] = column + i < this->inner
                              ? cuda::activate<decltype(kind)::value>(values[i] + biases.values[i]).value
                              : 0;
            }
            drop.kept(block.row(line), column).apply(values);
            hidden.store(block.local_row(line), column, pack<T>(values));
          }
        });
      });
    });
    return {scale.value()};
  }

  __device__ __forceinline__ Inputs prefetch(bool valid, const Rows& rows, int line, int column) const {
    return load_if(valid & (residual != nullptr), rows.residual.at(line, column));
  }

  __device__ __forceinline__ void write(bool valid, const Rows& rows, int line, int column, const float (&products)[8],
                                        const Inputs& inputs, const Columns& columns, const Terms& terms,
                                        float&) const {
    float values[8];
    unpack(inputs, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += terms.scale * (products[i] + columns.bias.values[i]);
    store_if(valid, rows.out.at(line, column), pack<T>(values));
  }
};

}  // namespace petl::cuda
