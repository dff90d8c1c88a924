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
    float factors[2], totals[2] = {};
    double share = watch.share();
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      factors[line] = rows.has_line(line) ? watch.scale() * gate[rows.line(line)] : 0;
    }
    if constexpr (kActivation == Activation::softmax) {
      sum_products(products, rows, totals);
      if (threadIdx.x % 4 == 0) share += double{factors[0]} * totals[0] + double{factors[1]} * totals[1];
    }
#pragma unroll
    for (int block = 0; block < kSums / 4; block += 4) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        float gradients[8], values[8];
        get_neighbors(products, block, line, gradients);
        load_scores<2 * kSums>(rows, line, block, values);
        share += differentiate<2 * kSums>(block, factors[line], totals[line], gradients, values);
        keep<2 * kSums>(rows, line, block, gradients, values, hidden);
      }
    }
    store_share(share, shares, rows);
  }

  __device__ __forceinline__ float2 combine(const float2 (&)[1], float2 sum, int, int, const Terms&) const {
    return sum;
  }

 private:
  template <int kInner>
  __device__ __forceinline__ bool has_neighbors(const WarpRows& rows, int line, int block) const {
    return rows.has_line(line) && unit_of_lane<kInner>(block) < kept;
  }

  template <int kInner>
  __device__ __forceinline__ void load_scores(const WarpRows& rows, int line, int block, float (&values)[8]) const {
    load_neighbors(has_neighbors<kInner>(rows, line, block),
                   scores + rows.line(line) * kept + unit_of_lane<kInner>(block), neighbors_from<kInner>(block),
                   values);
  }

  // sum over the row of scores * products
  template <int kSums>
  __device__ __forceinline__ void sum_products(const float (&products)[kSums], const WarpRows& rows,
                                               float (&totals)[2]) const {
#pragma unroll
    for (int block = 0; block < kSums / 4; block += 4) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        float sums[8], values[8];
        get_neighbors(products, block, line, sums);
        load_scores<2 * kSums>(rows, line, block, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) totals[line] = fmaf(values[i], sums[i], totals[line]);
      }
    }
#pragma unroll
    for (float& total : totals) total = reduce_quad(total, Add());
  }

  // Of eight scores: from products to dscores, from scores to what meets dout. Returns their share of dlog_scale.
  // Scores beyond the last are kept as zeros, and so are their gradients.
  template <int kInner>
  __device__ __forceinline__ float differentiate(int block, float factor, float total, float (&products)[8],
                                                 float (&values)[8]) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kActivation == Activation::relu) {
        // A comparison written so that the gradient at a NaN is NaN, not zero.
        products[i] = values[i] <= 0 ? 0 : factor * products[i];
        sum = fmaf(values[i], products[i], sum);
      } else {
        const bool is_there = unit_of_lane<kInner>(block) + i < P;
        products[i] = masked(is_there, factor * (values[i] * (products[i] - total)));
      }
      values[i] *= factor;
    }
    return sum;
  }

  template <int kInner>
  __device__ __forceinline__ void keep(const WarpRows& rows, int line, int block, const float (&gradients)[8],
                                       const float (&values)[8], uint32_t (&hidden)[kInner / 16][4]) const {
    uint32_t pairs[4], value_pairs[4];
    pack_pairs<T>(gradients, pairs);
    pack_pairs<T>(values, value_pairs);
    set_neighbors(hidden, block, line, pairs);
    const int64_t at = rows.line(line) * kept + unit_of_lane<kInner>(block);
    const bool is_kept = dscores && has_neighbors<kInner>(rows, line, block);
    store_neighbors(is_kept, dscores + at, neighbors_from<kInner>(block), pairs);
    store_neighbors(is_kept, weighted + at, neighbors_from<kInner>(block), value_pairs);
  }
};

}  // namespace petl::cuda
