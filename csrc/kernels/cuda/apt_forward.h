// Prompt diffusion's rows in forward.
#pragma once
#include "kernels/apt.h"
#include "kernels/cuda/dropout.h"
#include "kernels/cuda/sandwich.h"

namespace petl::cuda {

__device__ __forceinline__ float masked(bool valid, float value) { return valid ? value : 0.0f; }

// What scores are kept in: see kept_dtype in ops/apt.cpp.
template <class T>
struct KeptOf {
  using Type = float;
};
template <>
struct KeptOf<Bfloat16> {
  using Type = Bfloat16;
};

// out = exp(log_scale) (y + gate (scores prompts)), scores = act(x keys^T).
//
// What meets the prompts is scores / gate, which lies in [0, 1] whatever the scores are, so that float16 cannot
// overflow; the other factor gate comes at the end.
template <class T, bool kRest_>
struct AptForwardOp {
  using Element = T;
  using Kept = typename KeptOf<T>::Type;
  template <class>
  using Watch = NoWatch;
  // Rounded keys flip the ReLU's mask: the product takes what rounding leaves out as well. Softmax has no mask.
  static constexpr bool kRest = kRest_, kWritesRows = true;
  static constexpr int most_resident_blocks(int) { return 3; }

  const T* left;  // x
  int64_t left_stride;
  const T* first;   // keys
  const T* second;  // prompts
  int64_t R;
  int D, inner;
  Activation activation;
  Dropout dropout;
  const void* log_scale;
  DType log_scale_dtype;
  const T* y;
  int64_t y_stride;
  T* out;
  float* gate;
  Kept* scores;  // [R, kept]; null: not kept
  int kept;

  // exp(log_scale), and what the products are multiplied by
  struct Terms {
    float scale, factor[kMaxThreadRows];
  };
  using Inputs = Packed<T>;

  struct Rows {
    RowWalk<const T> y;
    RowWalk<T> out;

    __device__ __forceinline__ Rows(const AptForwardOp& op, int64_t row, int column)
        : y(RowWalk<const T>::from(op.y, op.y_stride, row, column)), out(RowWalk<T>::from(op.out, op.D, row, column)) {}
    __device__ __forceinline__ void advance(int columns) {
      y.first += columns;
      out.first += columns;
    }
  };

  struct Columns {
    __device__ __forceinline__ Columns(const AptForwardOp&, int) {}
  };

  template <class Block>
  __device__ __forceinline__ void end(const Block&, double) const {}
  __device__ __forceinline__ bool writes_rows() const { return true; }
  __device__ __forceinline__ bool multiplies() const { return true; }

  // The raw scores become scores / gate, the exponentials.
  template <class Block, class SumsOfThread>
  __device__ __forceinline__ void exponentiate(SumsOfThread& sums, const Block& block,
                                               float (&gates)[Block::kThreadRows]) const {
    float best[Block::kThreadRows], total[Block::kThreadRows] = {};
#pragma unroll
    for (float& value : best) value = -INFINITY;
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i < inner) best[line] = max_or_nan(best[line], values[i]);
      }
    });
    block.reduce_rows(best, Max());
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = masked(column + i < inner, expf(values[i] - best[line]));
        total[line] += values[i];
      }
    });
    block.reduce_rows(total, Add());
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) gates[line] = 1 / total[line];
  }

  template <class Block, class Hidden>
  __device__ __forceinline__ void store_scores(const Block& block, Hidden hidden, int line, int column,
                                               const float (&normalized)[8], const float (&values)[8]) const {
    hidden.store(block.local_row(line), column, pack<T>(normalized));
    const int64_t place = block.row(0) * kept + line * (int64_t{8} * kept) + column;
    store_if(scores && column < kept && block.has(line), scores + place, pack<Kept>(values));
  }

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ void activate_relu(SumsOfThread& sums, const Block& block, Hidden hidden,
                                                float (&gates)[Block::kThreadRows]) const {
#pragma unroll
    for (float& gate : gates) gate = 0;
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = masked(column + i < inner, max_or_nan(values[i], 0));
        gates[line] = max_or_nan(gates[line], values[i]);
      }
    });
    block.reduce_rows(gates, Max());
    float inverse[Block::kThreadRows];
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      // Below the smallest normal float gate^2 is zero, and so is what the inverse would be multiplied by. A NaN comes
      // through the factor.
      inverse[line] = gates[line] >= 1.2e-38f ? 1 / gates[line] : 0;
    }
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
      float normalized[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) normalized[i] = values[i] * inverse[line];
      store_scores(block, hidden, line, column, normalized, values);
    });
  }

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ void activate_softmax(SumsOfThread& sums, const Block& block, Hidden hidden,
                                                   float (&gates)[Block::kThreadRows]) const {
    exponentiate(sums, block, gates);
    block.for_each(sums, inner, [&](int line, int column, float (&normalized)[8]) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = normalized[i] * gates[line];
      store_scores(block, hidden, line, column, normalized, values);
    });
  }

  // Either activation with dropout: the gate and what meets the prompts follow from the scores that are kept.
  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ void activate_and_drop(SumsOfThread& sums, const Block& block, Hidden hidden,
                                                    float (&gates)[Block::kThreadRows]) const {
    const DropSome drop(dropout);
    // The scores are units * sums.
    float units[Block::kThreadRows], inverse[Block::kThreadRows];
    if (activation == Activation::softmax) {
      exponentiate(sums, block, units);
    } else {
#pragma unroll
      for (float& unit : units) unit = 1;
    }
#pragma unroll
    for (float& gate : gates) gate = 0;
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = masked(column + i < inner, max_or_nan(values[i], 0));
      float kept[8] = {values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]};
      drop.kept(block.row(line), column).apply(kept);
#pragma unroll
      for (int i = 0; i < 8; ++i) gates[line] = max_or_nan(gates[line], kept[i]);
    });
    block.reduce_rows(gates, Max());
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      inverse[line] = gates[line] >= 1.2e-38f ? 1 / gates[line] : 0;  // as in activate_relu
      gates[line] *= units[line];
    }
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
      float normalized[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        normalized[i] = values[i] * inverse[line];
        values[i] *= units[line];
      }
      drop.kept(block.row(line), column).apply(normalized);
      store_scores(block, hidden, line, column, normalized, values);
    });
  }

  template <class Block, class SumsOfThread, class Hidden>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Hidden hidden, double&) const {
    float gates[Block::kThreadRows];
    if (dropout.seeds) {
      activate_and_drop(sums, block, hidden, gates);
    } else if (activation == Activation::relu) {
      activate_relu(sums, block, hidden, gates);
    } else {
      activate_softmax(sums, block, hidden, gates);
    }
    Terms terms;
    terms.scale = expf(load_scalar(log_scale, log_scale_dtype, 0));
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      terms.factor[line] = terms.scale * gates[line] * gates[line];
      if (block.column_warp() == 0 && threadIdx.x % 4 == 0 && block.has(line)) gate[block.row(line)] = gates[line];
    }
    return terms;
  }

  __device__ __forceinline__ Inputs prefetch(bool valid, const Rows& rows, int line, int column) const {
    return load_if(valid, rows.y.at(line, column));
  }

  __device__ __forceinline__ void write(bool valid, const Rows& rows, int line, int column, const float (&products)[8],
                                        const Inputs& inputs, const Columns&, const Terms& terms, float&) const {
    float values[8];
    unpack(inputs, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = terms.scale * values[i] + terms.factor[line] * products[i];
    store_if(valid, rows.out.at(line, column), pack<T>(values));
  }
};

}  // namespace petl::cuda
