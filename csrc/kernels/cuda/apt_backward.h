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
  static constexpr Order kFirstOrder = Order::columns, kSecondOrder = Order::depth;
  static constexpr bool kSplits = false, kTransforms = false;
  static constexpr int most_resident_blocks(int groups) { return groups <= 2 ? 3 : 2; }

  const T* left;  // dout
  int64_t left_stride;
  Weights first;   // prompts
  Weights second;  // keys
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

  template <class Block>
  __device__ __forceinline__ void begin(const Block&) const {}
  __device__ __forceinline__ bool splits() const { return false; }
  __device__ __forceinline__ bool writes_rows() const { return dx || dy || y; }
  __device__ __forceinline__ bool multiplies() const { return dx; }

  __device__ __forceinline__ void load_scores(int64_t row, int column, float (&values)[8]) const {
    unpack(load_if(row < R && column < kept, scores + row * kept + column), values);
  }

  // sum over the row of scores * products
  template <class Block, class SumsOfThread>
  __device__ __forceinline__ void sum_rows(SumsOfThread& sums, const Block& block,
                                           float (&totals)[Block::kThreadRows]) const {
#pragma unroll
    for (float& total : totals) total = 0;
    block.for_each(sums, inner, [&](int line, int column, float (&products)[8]) {
      float values[8];
      load_scores(block.row(line), column, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) totals[line] += values[i] * products[i];
    });
    block.reduce_rows(totals, Add());
  }

  template <class Block, class SumsOfThread>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Tile<T> hidden) const {
    const float scale = expf(load_scalar(log_scale, log_scale_dtype, 0));
    float totals[Block::kThreadRows], factor[Block::kThreadRows];
    sum_rows(sums, block, totals);
    Terms terms{scale, 0};
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      factor[line] = block.row(line) < R ? scale * gate[block.row(line)] : 0;
      if (block.column_warp() == 0 && threadIdx.x % 4 == 0) terms.share += double{factor[line]} * totals[line];
    }
    const bool relu = activation == Activation::relu;
    block.for_each(sums, inner, [&](int line, int column, float (&products)[8]) {
      float values[8];
      load_scores(block.row(line), column, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // A comparison written so that the gradient at a NaN is NaN, not zero.
        const float through = relu ? (values[i] <= 0 ? 0 : products[i]) : values[i] * (products[i] - totals[line]);
        products[i] = masked(column + i < inner, factor[line] * through);
        values[i] = masked(column + i < inner, factor[line] * values[i]);
      }
      const Packed<T> packed = pack<T>(products);
      store(hidden.data + block.local_row(line) * hidden.stride + column, packed);
      if (column >= kept || block.row(line) >= R) return;
      if (!dscores) return;
      store(dscores + block.row(line) * kept + column, packed);
      store(weighted + block.row(line) * kept + column, pack<T>(values));
    });
    return terms;
  }

  __device__ __forceinline__ Inputs prefetch(int64_t row, int column) const {
    Inputs inputs = {};
    if (dy || y) inputs.dout = load(left + row * left_stride + column);
    if (y) inputs.y = load(y + row * y_stride + column);
    return inputs;
  }

  __device__ __forceinline__ void write(int64_t row, int column, const float (&products)[8], const Inputs& inputs,
                                        const Terms& terms, int, double& share) const {
    if (dx) store(dx + row * D + column, pack<T>(products));
    float values[8], other[8];
    unpack(inputs.dout, values);
    unpack(inputs.y, other);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum += values[i] * other[i];
      values[i] *= terms.scale;
    }
    share += double{terms.scale} * sum;
    if (dy) store(dy + row * D + column, pack<T>(values));
  }

  template <class Block>
  __device__ __forceinline__ void end(const Block& block, const Terms& terms, double share) const {
    const double total = sum_block(terms.share + share, block.block_scratch);
    if (threadIdx.x == 0) shares[blockIdx.x] = total;
  }
};

}  // namespace petl::cuda
