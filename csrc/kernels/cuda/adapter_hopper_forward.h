// The adapter's rows in forward by the Hopper path: what happens between its products, and at the end.
//
//     out = residual + scale (act(norm(x) down^T + down_bias) up^T + up_bias)
//
// x meets the folded weights as it is (adapter_packing.h). Its statistics are read off the same tiles, while the
// products with them are under way.
#pragma once
#include "kernels/cuda/adapter_forward.h"
#include "kernels/cuda/hopper_rows.h"

namespace petl::cuda {

// A lane's share of two rows: of the deviations from the mean of the row's first chunk. That mean is no further from
// the row's than all the others together can be, so that their squares keep the digits that 16-bit elements have.
template <class T>
struct ChunkDeviations {
  static constexpr bool kReads = true;

  float pivots[2], sums[2] = {}, squares[2] = {};

  template <class Op>
  __device__ __forceinline__ ChunkDeviations(const Op&, const WarpRows&) {}

  __device__ __forceinline__ void look(unsigned char* tile, int chunk) {
    float values[2][kHopperChunk / 4];
    load_as_sums<T>(tile, values);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      if (chunk == 0) {
        float sum = 0;
#pragma unroll
        for (const float value : values[line]) sum += value;
        pivots[line] = reduce_quad(sum, Add()) / kHopperChunk;
      }
#pragma unroll
      for (const float value : values[line]) {
        const float deviation = value - pivots[line];
        sums[line] += deviation;
        squares[line] = fmaf(deviation, deviation, squares[line]);
      }
    }
  }

  __device__ __forceinline__ RowStatistics of(int line, int D, float epsilon) const {
    const Deviations row{reduce_quad(sums[line], Add()), reduce_quad(squares[line], Add())};
    return statistics_of(pivots[line], row, D, epsilon);
  }
};

// Of the lane's first two units in a block of 8 columns, whether there are any. Those beyond the last have no weights,
// and become zero.
template <int kInner>
__device__ __forceinline__ bool has_unit(int block, int unit, int B) {
  return block / 4 * 32 + 32 <= hopper_least_inner(kInner) || unit < B;
}

__device__ __forceinline__ float2 load_unit_pair(bool is_there, const float* pair) {
  return is_there ? *reinterpret_cast<const float2*>(pair) : make_float2(0, 0);
}

// As ProductScale has it.
__device__ __forceinline__ float normalized_product(float sum, float unit_sum, const RowStatistics& row) {
  const float centered = fmaf(-row.mean, unit_sum, sum);
  return row.inverse * fmaf(-row.mean_rest, unit_sum, centered);
}

// The activation is a constant: with all of them in it, what lies between the products is half as long again.
template <class T, AdapterActivation kActivation, bool kHasNorm>
struct AdapterHopperOp {
  using Element = T;
  using Watch = std::conditional_t<kHasNorm, ChunkDeviations<T>, NoHopperWatch>;
  static constexpr int kLefts = 1, kTiles = 1;
  struct Terms {
    float scale;
  };

  int D, B;
  AdapterVectors vectors;
  Scale scale;
  float epsilon;

  __device__ __forceinline__ void prefetch(int64_t, int64_t) const {}

  template <int kSums>
  __device__ __forceinline__ void activate(float (&sums)[kSums], const WarpRows&, const Watch& watch, Terms& terms,
                                           uint32_t (&hidden)[kSums / 8][4]) const {
    constexpr int kInner = 2 * kSums;
    terms.scale = scale.value();
    RowStatistics rows[2];
    if constexpr (kHasNorm) {
      const float unscale = *vectors.unscale;
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        rows[line] = watch.of(line, D, epsilon);
        rows[line].inverse *= unscale;
      }
    }
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) hidden[i / 4][i % 4] = 0;
#pragma unroll
    for (int block = 0; block < kInner / 8; ++block) {
      // A branch that keeps groups of 32 columns apart, as in visit_neighbors, where registers are short.
      if (!kHasNorm && kInner > 208 && block / 4 * 32 >= B) continue;
      const int unit = unit_of_lane<kInner>(block);
      const bool is_there = has_unit<kInner>(block, unit, B);
      const float2 biases = load_unit_pair(is_there, vectors.biases + unit);
      const float2 unit_sums = load_unit_pair(kHasNorm && is_there, vectors.sums + unit);
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        const float* const sum = &sums[block * 4 + line * 2];
        float2 raw = make_float2(sum[0], sum[1]);
        if constexpr (kHasNorm) {
          raw = make_float2(normalized_product(raw.x, unit_sums.x, rows[line]),
                            normalized_product(raw.y, unit_sums.y, rows[line]));
        }
        hidden[block / 2][block % 2 * 2 + line] = pack_pair(cuda::activate<kActivation>(raw.x + biases.x).value,
                                                            cuda::activate<kActivation>(raw.y + biases.y).value, T{});
      }
    }
  }

  __device__ __forceinline__ float2 combine(const float2 (&added)[1], float2 sum, int, int column,
                                            const Terms& terms) const {
    const float2 residual = added[0];
    const float2 bias = *reinterpret_cast<const float2*>(vectors.up_bias + column);
    return make_float2(residual.x + terms.scale * (sum.x + bias.x), residual.y + terms.scale * (sum.y + bias.y));
  }
};

}  // namespace petl::cuda
