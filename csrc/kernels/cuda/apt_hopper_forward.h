// Prompt diffusion's rows in forward by the Hopper path: what happens between its products, and at the end.
//
//     out = exp(log_scale) (y + gate (scores prompts)),    scores = act(x keys^T)
#pragma once
#include "kernels/cuda/apt_forward.h"
#include "kernels/cuda/hopper_rows.h"

namespace petl::cuda {

// A lane has columns 2 t and 2 t + 1, in every block of 8, of rows g and g + 8: neighboring prompts (unit_of).
template <class T, Activation kActivation>
struct AptHopperOp {
  using Element = T;
  using Kept = typename KeptOf<T>::Type;
  using Watch = NoHopperWatch;
  static constexpr int kLefts = 1, kTiles = 1;
  static constexpr bool kIsRelu = kActivation == Activation::relu;
  struct Terms {
    float scale, factors[2];
  };

  const void* log_scale;
  DType log_scale_dtype;
  float* gate;
  Kept* scores;  // [R, kept]; null: not kept
  int P, kept;

  __device__ __forceinline__ void prefetch(int64_t, int64_t) const {}

  // The sums become the second product's left operand, scores / gate, as in apt_forward.h.
  template <int kSums>
  __device__ __forceinline__ void activate(float (&sums)[kSums], const WarpRows& rows, const Watch&, Terms& terms,
                                           uint32_t (&hidden)[kSums / 8][4]) const {
    terms.scale = expf(load_scalar(log_scale, log_scale_dtype, 0));
    float inverses[2];
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      const float row_gate = kIsRelu ? greatest(sums, line, 0) : 1 / exponentiate(sums, line);
      // Below the smallest normal float gate^2 is zero, and so is what the inverse would be multiplied by. A NaN comes
      // through the factor.
      inverses[line] = !kIsRelu ? 1 : row_gate >= 1.2e-38f ? 1 / row_gate : 0;
      terms.factors[line] = terms.scale * row_gate * row_gate;
      if (!rows.has_line(line)) continue;
      const int64_t row = rows.line(line);
      if (threadIdx.x % 4 == 0) gate[row] = row_gate;
      if (scores) store_scores(sums, line, kIsRelu ? 1 : row_gate, scores + row * kept);
    }
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const float inverse = inverses[i % 2];
      hidden[i / 4][i % 4] = pack_relu_pair(sums[2 * i] * inverse, sums[2 * i + 1] * inverse, T{});
    }
  }

  __device__ __forceinline__ float2 combine(const float2 (&added)[1], float2 sum, int line, int,
                                            const Terms& terms) const {
    const float2 y = added[0];
    return make_float2(terms.scale * y.x + terms.factors[line] * sum.x,
                       terms.scale * y.y + terms.factors[line] * sum.y);
  }

 private:
  // Whether there is a prompt for column i of the lane's two in a block of 8.
  template <int kInner>
  __device__ __forceinline__ bool has(int block, int i) const {
    constexpr int kLeast = hopper_least_inner(kInner);
    return block / 4 * 32 + 32 <= kLeast || unit_of_lane<kInner>(block) + i < P;
  }

  // Of a row's scores, at least this.
  template <int kSums>
  __device__ __forceinline__ float greatest(const float (&sums)[kSums], int line, float least) const {
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const int block = i / 2;
      // The ReLU's zeros beyond the last prompt change nothing.
      if (!kIsRelu && !has<2 * kSums>(block, i % 2)) continue;
      least = max_or_nan(least, sums[block * 4 + line * 2 + i % 2]);
    }
    return reduce_quad(least, Max());
  }

  // A row's scores become exponentials, of which it returns the sum.
  template <int kSums>
  __device__ __forceinline__ float exponentiate(float (&sums)[kSums], int line) const {
    const float best = greatest(sums, line, -INFINITY);
    float total = 0;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const int block = i / 2;
      float& sum = sums[block * 4 + line * 2 + i % 2];
      sum = masked(has<2 * kSums>(block, i % 2), expf(sum - best));
      total += sum;
    }
    return reduce_quad(total, Add());
  }

  // A row's, by as many as are neighbors.
  template <int kSums>
  __device__ __forceinline__ void store_scores(const float (&sums)[kSums], int line, float factor, Kept* row) const {
    constexpr int kInner = 2 * kSums;
#pragma unroll
    for (int block = 0; block < kInner / 8; block += 4) {
      const int count = neighbors_from<kInner>(block);
      float values[8] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < count) values[i] = sums[(block + i / 2) * 4 + line * 2 + i % 2] * factor;
      }
      store_neighbors(row, unit_of_lane<kInner>(block), count, values);
    }
  }

  __device__ __forceinline__ void store_neighbors(Kept* row, int prompt, int count, const float (&values)[8]) const {
    if (prompt >= kept) return;
    if constexpr (std::is_same_v<Kept, float>) {
      const auto four = [&](int i) {
        return make_float4(max_or_nan(values[i], 0), max_or_nan(values[i + 1], 0), max_or_nan(values[i + 2], 0),
                           max_or_nan(values[i + 3], 0));
      };
      *reinterpret_cast<float4*>(row + prompt) = four(0);
      if (count == 8) *reinterpret_cast<float4*>(row + prompt + 4) = four(4);
    } else {
      const auto two = [&](int i) { return pack_relu_pair(values[i], values[i + 1], T{}); };
      if (count == 8) {
        *reinterpret_cast<uint4*>(row + prompt) = make_uint4(two(0), two(2), two(4), two(6));
      } else {
        *reinterpret_cast<uint2*>(row + prompt) = make_uint2(two(0), two(2));
      }
    }
  }
};

}  // namespace petl::cuda
