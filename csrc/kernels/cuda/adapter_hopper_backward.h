// The gradients of the adapter's rows by the Hopper path: what happens between its products, and at the end.
//
//     products = norm(x) down^T                              computed anew, as forward has them
//     dhidden = scale (dout up) act'(products + biases)      dx = what LayerNorm makes of dhidden down (+ dout)
//
// as adapter_backward.h has it, in one launch: the first of its three products leaves its sums to the lane that will
// want them again, in memory that the block has for itself, and that stays in the second-level cache.
#pragma once
#include "kernels/cuda/adapter_hopper_forward.h"
#include "kernels/cuda/hopper_neighbors.h"

namespace petl::cuda {

// Sums dout up_bias^T of the warp's rows, which is their bias' share of dgain.
template <class Op>
class HopperBiasShare {
  using T = typename Op::Element;

 public:
  static constexpr bool kReads = true;

  __device__ __forceinline__ HopperBiasShare(const Op& op, const WarpRows&) : op_(op) {}

  // Rows that are not there are zeros.
  __device__ __forceinline__ void look(unsigned char* tile, int chunk) {
    if (!op_.shares) return;
    const EightFloats bias(op_.vectors.up_bias + chunk * kHopperChunk + RowVectors::column());
    float sum = 0;
#pragma unroll
    for (int i = 0; i < RowVectors::kCount; ++i) {
      float dout[8];
      unpack(RowVectors::load<T>(tile, i), dout);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(dout[j], bias.values[j], sum);
    }
    share_ += sum;
  }

  __device__ __forceinline__ double share() const { return share_; }

 private:
  const Op& op_;
  double share_ = 0;
};

template <class T, AdapterActivation kActivation, bool kHasNorm>
struct AdapterHopperBackwardOp {
  using Element = T;
  using FirstWatch = std::conditional_t<kHasNorm, ChunkDeviations<T>, NoHopperWatch>;
  using Watch = HopperBiasShare<AdapterHopperBackwardOp>;
  // x and dout are both multiplied; dout is added, and where there is a norm so is x.
  static constexpr int kLefts = 2, kTiles = kHasNorm ? 2 : 1;
  struct Terms {
    RowStatistics rows[2];
    float means[2], slopes[2];  // as in adapter_backward.h
  };

  int D, B, kept;
  AdapterVectors vectors;
  Scale scale;
  float epsilon;
  RowStatistics* statistics;  // [R]
  float4* products;           // of each block of threads, without the norm's bias, as lanes have their sums
  T *hidden, *dhidden;        // [R, kept], after the activation; null: no weight has a gradient
  double* shares;             // of dgain, one per warp; null: not wanted

  __device__ __forceinline__ void prefetch(int64_t, int64_t) const {}

  template <int kSums>
  __device__ __forceinline__ void keep(const float (&sums)[kSums], const WarpRows& rows, const FirstWatch& watch,
                                       Terms& terms) const {
    RowStatistics scaled[2];
    if constexpr (kHasNorm) {
      const float unscale = *vectors.unscale;
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        scaled[line] = terms.rows[line] = watch.of(line, D, epsilon);
        scaled[line].inverse *= unscale;
        if (threadIdx.x % 4 == 0 && rows.has_line(line)) statistics[rows.line(line)] = terms.rows[line];
      }
    }
#pragma unroll
    for (int block = 0; block < kSums / 4; ++block) {
      float4 four = make_float4(sums[block * 4], sums[block * 4 + 1], sums[block * 4 + 2], sums[block * 4 + 3]);
      if constexpr (kHasNorm) {
        const int unit = unit_of_lane<2 * kSums>(block);
        const float2 unit_sums = load_unit_pair(has_unit<2 * kSums>(block, unit, B), vectors.sums + unit);
        four = make_float4(
            normalized_product(four.x, unit_sums.x, scaled[0]), normalized_product(four.y, unit_sums.y, scaled[0]),
            normalized_product(four.z, unit_sums.x, scaled[1]), normalized_product(four.w, unit_sums.y, scaled[1]));
      }
      *products_of<kSums>(block) = four;
    }
  }

  template <int kSums>
  __device__ __forceinline__ void activate(float (&sums)[kSums], const WarpRows& rows, const Watch& watch, Terms& terms,
                                           uint32_t (&hidden_pairs)[kSums / 8][4]) const {
    constexpr int kInner = 2 * kSums;
    const NeighborRows<kInner> where(rows, kept);
    const float factor = scale.value();
    float share = 0, next[2][8], units[2][8];
#pragma unroll
    for (int line = 0; line < 2; ++line) terms.means[line] = terms.slopes[line] = 0;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) hidden_pairs[i / 4][i % 4] = 0;
    load_products<kSums>(0, next);
#pragma unroll
    for (int block = 0; block < kInner / 8; block += 4) {
#pragma unroll
      for (int i = 0; i < 16; ++i) units[i / 8][i % 8] = next[i / 8][i % 8];
      if (block + 4 < kInner / 8) load_products<kSums>(block + 4, next);
      // As in visit_neighbors.
      if (block * 8 >= kept) continue;
      float biases[8], weights[8];
      load_units<kInner>(vectors.biases, block, biases);
      if constexpr (kHasNorm) load_units<kInner>(vectors.mean_weight, block, weights);
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        float gradients[8];
        get_neighbors(sums, block, line, gradients);
        share += differentiate(line, biases, weights, factor, gradients, units[line], terms);
        uint32_t pairs[4], unit_pairs[4];
        pack_pairs<T>(gradients, pairs);
        pack_pairs<T>(units[line], unit_pairs);
        set_neighbors(hidden_pairs, block, line, pairs);
        if (!dhidden) continue;
        where.store(dhidden, block, line, pairs);
        where.store(hidden, block, line, unit_pairs);
      }
    }
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      terms.means[line] = reduce_quad(terms.means[line], Add());
      terms.slopes[line] = reduce_quad(terms.slopes[line], Add()) / static_cast<float>(D);
    }
    if (shares) store_share(double{scale.factor} * (share + watch.share()), shares, rows);
  }

  __device__ __forceinline__ float2 combine(const float2 (&added)[kTiles], float2 sum, int line, int column,
                                            const Terms& terms) const {
    const float2 dout = added[kTiles - 1];
    if constexpr (!kHasNorm) return make_float2(dout.x + sum.x, dout.y + sum.y);
    const float2 weight = *reinterpret_cast<const float2*>(vectors.norm_weight + column);
    return make_float2(through_norm(added[0].x, weight.x * sum.x, dout.x, line, terms),
                       through_norm(added[0].y, weight.y * sum.y, dout.y, line, terms));
  }

 private:
  __device__ __forceinline__ static float through_norm(float x, float gradient, float dout, int line,
                                                       const Terms& terms) {
    const RowStatistics& row = terms.rows[line];
    const float centered = x - row.mean - row.mean_rest, slope = -row.inverse * terms.slopes[line];
    return fmaf(row.inverse, fmaf(slope, centered, gradient - terms.means[line]), dout);
  }

  // Four sums of the lane, in a block of 8 columns: a warp's lie back to back.
  template <int kSums>
  __device__ __forceinline__ float4* products_of(int block) const {
    constexpr int kThreads = 32 * kConsumerWarps;
    return products + (static_cast<int64_t>(blockIdx.x) * (kSums / 4) + block) * kThreads + threadIdx.x;
  }

  template <int kSums>
  __device__ __forceinline__ void load_products(int block, float (&units)[2][8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = 2 * i < neighbors_from<2 * kSums>(block);
      const float4 four = exists ? *products_of<kSums>(block + i) : make_float4(0, 0, 0, 0);
      units[0][2 * i] = four.x, units[0][2 * i + 1] = four.y, units[1][2 * i] = four.z, units[1][2 * i + 1] = four.w;
    }
  }

  // Of the lane's units from a block's first one on. There are no more than neighbors, nor any beyond those packed.
  template <int kInner>
  __device__ __forceinline__ void load_units(const float* vector, int block, float (&values)[8]) const {
    const int unit = unit_of_lane<kInner>(block);
    const bool is_there = has_unit<kInner>(block, unit, B);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const bool exists = is_there && i < neighbors_from<kInner>(block);
      const float4 four = exists ? *reinterpret_cast<const float4*>(vector + unit + i) : make_float4(0, 0, 0, 0);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }

  // From the gradients of eight hidden units after the activation to those before it; from products to units. Returns
  // what they have of dgain.
  __device__ __forceinline__ float differentiate(int line, const float (&biases)[8], const float (&weights)[8],
                                                 float factor, float (&gradients)[8], float (&units)[8],
                                                 Terms& terms) const {
    float share = 0, mean = 0, slope = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const ActivationValue value = cuda::activate<kActivation>(units[i] + biases[i]);
      share = fmaf(gradients[i], value.value, share);
      gradients[i] *= factor * value.derivative;
      if constexpr (kHasNorm) {
        mean = fmaf(gradients[i], weights[i], mean);
        slope = fmaf(gradients[i], units[i], slope);
      }
      units[i] = value.value;
    }
    terms.means[line] += mean;
    terms.slopes[line] += slope;
    return share;
  }
};

}  // namespace petl::cuda
