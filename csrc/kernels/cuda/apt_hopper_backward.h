// The gradients of prompt diffusion's rows by the Hopper path: what happens between its products, and beside the first.
//
//     products = dout prompts^T    dscores = exp(log_scale) gate products [scores > 0]    dx = dscores keys
//
// as apt_backward.h has it. dout is read once: for dy and for dlog_scale while the products with it are under way.
#pragma once
#include "kernels/cuda/apt_forward.h"
#include "kernels/cuda/hopper_neighbors.h"

namespace petl::cuda {

// Makes dy of dout, and sums dout y. The next chunk of y is on its way while this one is multiplied.
template <class Op>
class AptHopperWatch {
  using T = typename Op::Element;

 public:
  static constexpr bool kReads = true;

  __device__ __forceinline__ AptHopperWatch(const Op& op, const WarpRows& rows)
      : scale_(expf(load_scalar(op.log_scale, op.log_scale_dtype, 0))),
        columns_(op.D),
        y_(op.y + (rows.first + RowVectors::row(0)) * op.y_stride + RowVectors::column()),
        dy_(op.dy + (rows.first + RowVectors::row(0)) * op.D + RowVectors::column()),
        y_step_(4 * op.y_stride),
        dy_step_(int64_t{4} * op.D) {
    const int count = static_cast<int>(min(rows.R - rows.first, int64_t{kWarpRows}));
    y_rows_ = op.y ? count : 0;
    dy_rows_ = op.dy ? count : 0;
    load_chunk();
  }

  __device__ __forceinline__ void look(unsigned char* tile, int) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < RowVectors::kCount; ++i) {
      float dout[8], y[8];
      unpack(RowVectors::load<T>(tile, i), dout);
      unpack(next_[i], y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum = fmaf(dout[j], y[j], sum);
        dout[j] *= scale_;
      }
      store_if(RowVectors::row(i) < dy_rows_, dy_ + i * dy_step_, pack<T>(dout));
    }
    share_ += sum;
    dy_ += kHopperChunk;
    y_ += kHopperChunk;
    columns_ -= kHopperChunk;
    load_chunk();
  }

  __device__ __forceinline__ float scale() const { return scale_; }
  // Of dlog_scale.
  __device__ __forceinline__ double share() const { return scale_ * share_; }

 private:
  __device__ __forceinline__ void load_chunk() {
    const int rows = columns_ > 0 ? y_rows_ : 0;
#pragma unroll
    for (int i = 0; i < RowVectors::kCount; ++i) next_[i] = load_if(RowVectors::row(i) < rows, y_ + i * y_step_);
  }

  float scale_;
  int y_rows_, dy_rows_;  // that there are; none where they are not wanted
  int columns_;           // of y from here on
  const T* y_;
  T* dy_;
  int64_t y_step_, dy_step_;
  Packed<T> next_[RowVectors::kCount];
  double share_ = 0;
};

template <class T, Activation kActivation>
struct AptHopperBackwardOp {
  using Element = T;
  using Kept = typename KeptOf<T>::Type;
  using Watch = AptHopperWatch<AptHopperBackwardOp>;
  static constexpr int kLefts = 1, kTiles = 1;
  struct Terms {};

  const void* log_scale;
  DType log_scale_dtype;
  const T* y;  // null: dlog_scale is not wanted
  int64_t y_stride;
  T* dy;  // null: not wanted
  const float* gate;
  const Kept* scores;  // [R, kept]
  int D, P, kept;
  T* dscores;      // [R, kept]; null: no weight has a gradient
  T* weighted;     // [R, kept], exp(log_scale) gate scores
  double* shares;  // of dlog_scale, one per warp

  // The scores that the tile will meet lie back to back.
  __device__ __forceinline__ void prefetch(int64_t first_row, int64_t R) const {
    const int64_t rows = R - first_row < kHopperRows ? R - first_row : kHopperRows;
    const int bytes = static_cast<int>(rows * kept * static_cast<int>(sizeof(Kept)));
    if (rows > 0) prefetch_bulk(scores + first_row * kept, bytes);
  }

  template <int kSums>
  __device__ __forceinline__ void activate(float (&products)[kSums], const WarpRows& rows, const Watch& watch, Terms&,
                                           uint32_t (&hidden)[kSums / 8][4]) const {
    constexpr int kInner = 2 * kSums;
    const NeighborRows<kInner> where(rows, kept);
    float factors[2], totals[2] = {}, share = 0;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      factors[line] = rows.has_line(line) ? watch.scale() * gate[rows.line(line)] : 0;
    }
    if constexpr (kActivation == Activation::softmax) {
      sum_products(products, where, totals);
      if (threadIdx.x % 4 == 0) share = factors[0] * totals[0] + factors[1] * totals[1];
    }
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) hidden[i / 4][i % 4] = 0;
    visit_neighbors(where, scores, [&](int block, int line, float (&values)[8]) {
      float gradients[8];
      get_neighbors(products, block, line, gradients);
      share += differentiate<kInner>(block, factors[line], totals[line], gradients, values);
      uint32_t pairs[4], value_pairs[4];
      pack_pairs<T>(gradients, pairs);
      pack_pairs<T>(values, value_pairs);
      set_neighbors(hidden, block, line, pairs);
      if (!dscores) return;
      where.store(dscores, block, line, pairs);
      where.store(weighted, block, line, value_pairs);
    });
    store_share(watch.share() + share, shares, rows);
  }

  __device__ __forceinline__ float2 combine(const float2 (&)[1], float2 sum, int, int, const Terms&) const {
    return sum;
  }

 private:
  // sum over the row of scores * products
  template <int kSums>
  __device__ __forceinline__ void sum_products(const float (&products)[kSums], const NeighborRows<2 * kSums>& where,
                                               float (&totals)[2]) const {
    visit_neighbors(where, scores, [&](int block, int line, const float (&values)[8]) {
      float row[8], sums[2] = {};
      get_neighbors(products, block, line, row);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i % 2] = fmaf(values[i], row[i], sums[i % 2]);
      totals[line] += sums[0] + sums[1];
    });
#pragma unroll
    for (float& total : totals) total = reduce_quad(total, Add());
  }

  // Of eight scores: from products to dscores, from scores to what meets dout. Returns their share of dlog_scale, where
  // it is not found otherwise. Scores beyond the last are kept as zeros, and so are their gradients.
  template <int kInner>
  __device__ __forceinline__ float differentiate(int block, float factor, float total, float (&products)[8],
                                                 float (&values)[8]) const {
    // Two sums, since one would have each addition wait for the one before.
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kActivation == Activation::relu) {
        // A comparison written so that the gradient at a NaN is NaN, not zero.
        products[i] = values[i] <= 0 ? 0 : factor * products[i];
        sums[i % 2] = fmaf(values[i], products[i], sums[i % 2]);
      } else {
        const bool is_there = block * 8 + 32 <= hopper_least_inner(kInner) || unit_of_lane<kInner>(block) + i < P;
        products[i] = masked(is_there, factor * (values[i] * (products[i] - total)));
      }
      values[i] *= factor;
    }
    return sums[0] + sums[1];
  }
};

}  // namespace petl::cuda
