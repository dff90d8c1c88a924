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
  Dropout dropout;
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
  };
  struct Inputs {
    Packed<T> dout, y;
  };

  struct Rows {
    // One flag each: a condition of several would become a branch for every vector.
    bool has_y, has_dx, has_dy;
    RowWalk<const T> dout, y;
    RowWalk<T> dx, dy;

    __device__ __forceinline__ Rows(const AptBackwardOp& op, int64_t row, int column)
        : has_y(op.y),
          has_dx(op.dx),
          has_dy(op.dy),
          dout(RowWalk<const T>::from(op.left, op.left_stride, row, column)),
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

  // Where the thread's kept scores of a line lie, less the column.
  template <class Block>
  __device__ __forceinline__ int64_t place_of(const Block& block, int line) const {
    return block.row(0) * kept + line * (int64_t{8} * kept);
  }

  template <class Block>
  __device__ __forceinline__ Packed<Kept> load_scores(const Block& block, int line, int column) const {
    return load_if(block.has(line) && column < kept, scores + place_of(block, line) + column);
  }

  // sum over the row of scores * products, which dropout leaves
  template <class Block, class SumsOfThread, class Drop>
  __device__ __forceinline__ void sum_rows(SumsOfThread& sums, const Block& block, const Drop& drop,
                                           float (&totals)[Block::kThreadRows]) const {
#pragma unroll
    for (float& total : totals) total = 0;
    block.for_each(sums, inner, [&](int line, int column, float (&products)[8]) {
      drop.kept(block.row(line), column).apply(products);
      float values[8];
      unpack(load_scores(block, line, column), values);
#pragma unroll
      for (int i = 0; i < 8; ++i) totals[line] += values[i] * products[i];
    });
    block.reduce_rows(totals, Add());
  }

  template <class Block, class Hidden>
  __device__ __forceinline__ void store_gradients(const Block& block, Hidden hidden, int line, int column,
                                                  const float (&gradients)[8], const float (&values)[8]) const {
    const Packed<T> packed = pack<T>(gradients);
    hidden.store(block.local_row(line), column, packed);
    const bool valid = (dscores != nullptr) & (column < kept) & block.has(line);
    const int64_t place = place_of(block, line) + column;
    store_if(valid, dscores + place, packed);
    store_if(valid, weighted + place, pack<T>(values));
  }

  // Scores beyond the last are kept as zeros, and so are their gradients.
  template <class Block, class SumsOfThread, class Hidden, class Drop>
  __device__ __forceinline__ void activate_relu(SumsOfThread& sums, const Block& block, Hidden hidden, const Drop& drop,
                                                const float (&factor)[Block::kThreadRows], double& share) const {
    block.for_each(sums, inner, [&](int line, int column, float (&products)[8]) {
      const auto kept_scores = drop.kept(block.row(line), column);
      kept_scores.apply(products);
      float values[8], sum = 0;
      unpack(load_scores(block, line, column), values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // A comparison written so that the gradient at a NaN is NaN, not zero.
        products[i] = values[i] <= 0 ? 0 : factor[line] * products[i];
        sum += values[i] * products[i];
        values[i] *= factor[line];
      }
      share += sum;
      kept_scores.apply(values);
      store_gradients(block, hidden, line, column, products, values);
    });
  }

  template <class Block, class SumsOfThread, class Hidden, class Drop>
  __device__ __forceinline__ void activate_softmax(SumsOfThread& sums, const Block& block, Hidden hidden,
                                                   const Drop& drop, const float (&factor)[Block::kThreadRows],
                                                   double& share) const {
    float totals[Block::kThreadRows];
    sum_rows(sums, block, drop, totals);
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      if (block.column_warp() == 0 && threadIdx.x % 4 == 0) share += double{factor[line]} * totals[line];
    }
    block.for_each(sums, inner, [&](int line, int column, float (&products)[8]) {
      float values[8];
      unpack(load_scores(block, line, column), values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float gradient = values[i] * (products[i] - totals[line]);
        products[i] = masked(column + i < inner, factor[line] * gradient);
        values[i] *= factor[line];
      }
      drop.kept(block.row(line), column).apply(values);
      store_gradients(block, hidden, line, column, products, values);
    });
  }

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Hidden hidden,
                                            double& share) const {
    const Terms terms{expf(load_scalar(log_scale, log_scale_dtype, 0))};
    float factor[Block::kThreadRows];
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      factor[line] = block.has(line) ? terms.scale * gate[block.row(line)] : 0;
    }
    with_dropout(dropout, [&](const auto& drop) {
      if (activation == Activation::relu) {
        activate_relu(sums, block, hidden, drop, factor, share);
      } else {
        activate_softmax(sums, block, hidden, drop, factor, share);
      }
    });
    return terms;
  }

  __device__ __forceinline__ Inputs prefetch(bool valid, const Rows& rows, int line, int column) const {
    return {load_if(valid, rows.dout.at(line, column)), load_if(valid & rows.has_y, rows.y.at(line, column))};
  }

  __device__ __forceinline__ void write(bool valid, const Rows& rows, int line, int column, const float (&products)[8],
                                        const Inputs& inputs, const Columns&, const Terms& terms, float& share) const {
    float values[8], other[8], sum = 0;
    unpack(inputs.dout, values);
    unpack(inputs.y, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum += values[i] * other[i];
      values[i] *= terms.scale;
    }
    share += terms.scale * sum;
    store_if(valid & rows.has_dx, rows.dx.at(line, column), pack<T>(products));
    store_if(valid & rows.has_dy, rows.dy.at(line, column), pack<T>(values));
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block& block, double share) const {
    const double total = sum_block(share, block.block_scratch);
    if (threadIdx.x == 0) shares[blockIdx.x] = total;
  }
};

}  // namespace petl::cuda
