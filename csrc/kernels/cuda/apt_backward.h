// The gradients of prompt diffusion's rows.
#pragma once
#include "kernels/cuda/apt_forward.h"

namespace petl::cuda {

// From dout to dx, dy, the left operands of the weights' gradients, and a share of dlog_scale per block of rows:
//
//     products = dout prompts^T    dscores = exp(log_scale) gate products [scores > 0]    dx = dscores keys
template <class T>
struct AptBackwardOp {
  using Element = T;
  using Kept = typename KeptOf<T>::Type;
  template <class>
  using Watch = NoWatch;
  static constexpr bool kRest = false, kWritesRows = true;
  static constexpr int most_resident_blocks(int groups) { return groups <= 2 ? 3 : 2; }

  const T* left;  // dout
  int64_t left_stride;
  const T* first;   // prompts
  const T* second;  // keys
  int64_t R;
  int D, inner;
  Activation activation;
  const void* log_scale;
  DType log_scale_dtype;
  const T* y;  // null: dlog_scale is not wanted
  int64_t y_stride;
  const float* gate;
  const Kept* scores;  // [R, kept]
  int kept;
  T* dx;
  T* dy;
  T* dscores;      // [R, kept]; null: no weight has a gradient
  T* weighted;     // [R, kept], exp(log_scale) gate scores
  double* shares;  // of dlog_scale, one per block of rows

  struct Terms {
    float scale;
    double share;  // the thread's, of sum(dout (out - exp(log_scale) y))
  };
  struct Inputs {
    Packed<T> dout, y;
  };

  struct Rows {
    RowWalk<const T> dout, y;
    RowWalk<T> dx, dy;

    __device__ __forceinline__ Rows(const AptBackwardOp& op, int64_t row, int column)
        : dout(RowWalk<const T>::from(op.left, op.left_stride, row, column)),
          y(RowWalk<const T>::from(op.y, op.y_stride, row, column)),
          dx(RowWalk<T>::from(op.dx, op.D, row, column)),
          dy(RowWalk<T>::from(op.dy, op.D, row, column)) {}
    __device__ __forceinline__ void advance(int columns) {
      dout.first += columns;
      y.first += columns;
      dx.first += columns;
      dy.first += columns;
    }
  };

  struct Columns {
    __device__ __forceinline__ Columns(const AptBackwardOp&, int) {}
  };

  __device__ __forceinline__ bool writes_rows() const { return dx || dy || y; }
  __device__ __forceinline__ bool multiplies() const { return dx; }

  __device__ __forceinline__ void load_scores(bool valid, int64_t row, int column, float (&values)[8]) const {
    unpack(load_if(valid && column < kept, scores + row * kept + column), values);
  }

  // sum over the row of scores * products
  template <class Block, class SumsOfThread>
  __device__ __forceinline__ void sum_rows(SumsOfThread& sums, const Block& block,
                                           float (&totals)[Block::kThreadRows]) const {
#pragma unroll
    for (float& total : totals) total = 0;
    block.for_each(sums, inner, [&](int line, int column, float (&products)[8]) {
      float values[8];
      load_scores(block.has(line), block.row(line), column, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) totals[line] += values[i] * products[i];
    });
    block.reduce_rows(totals, Add());
  }

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Hidden hidden) const {
    const float scale = expf(load_scalar(log_scale, log_scale_dtype, 0));
    float totals[Block::kThreadRows], factor[Block::kThreadRows];
    sum_rows(sums, block, totals);
    Terms terms{scale, 0};
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      factor[line] = block.has(line) ? scale * gate[block.row(line)] : 0;
      if (block.column_warp() == 0 && threadIdx.x % 4 == 0) terms.share += double{factor[line]} * totals[line];
    }
    const bool relu = activation == Activation::relu;
    block.for_each(sums, inner, [&](int line, int column, float (&products)[8]) {
      float values[8];
      load_scores(block.has(line), block.row(line), column, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // A comparison written so that the gradient at a NaN is NaN, not zero.
        const float through = relu ? (values[i] <= 0 ? 0 : products[i]) : values[i] * (products[i] - totals[line]);
        products[i] = masked(column + i < inner, factor[line] * through);
        values[i] = masked(column + i < inner, factor[line] * values[i]);
      }
      const Packed<T> packed = pack<T>(products);
      hidden.store(block.local_row(line), column, packed);
      if (column >= kept || !block.has(line)) return;
      if (!dscores) return;
      store(dscores + block.row(line) * kept + column, packed);
      store(weighted + block.row(line) * kept + column, pack<T>(values));
    });
    return terms;
  }

  __device__ __forceinline__ Inputs prefetch(bool valid, const Rows& rows, int line, int column) const {
    return {load_if(valid && (dy || y), rows.dout.at(line, column)), load_if(valid && y, rows.y.at(line, column))};
  }

  __device__ __forceinline__ void write(bool valid, const Rows& rows, int line, int column, const float (&products)[8],
                                        const Inputs& inputs, const Columns&, const Terms& terms, float& share) const {
    float values[8], other[8];
    unpack(inputs.dout, values);
    unpack(inputs.y, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      share += values[i] * other[i];
      values[i] *= terms.scale;
    }
    store_if(valid && dx, rows.dx.at(line, column), pack<T>(products));
    store_if(valid && dy, rows.dy.at(line, column), pack<T>(values));
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block& block, const Terms& terms, double share) const {
    const double total = sum_block(terms.share + double{terms.scale} * share, block.block_scratch);
    if (threadIdx.x == 0) shares[blockIdx.x] = total;
  }
};

}  // namespace petl::cuda
