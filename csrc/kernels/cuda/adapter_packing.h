// What the adapter's kernels need beside packed matrices: rows of its parameters as floats, and what LayerNorm's
// parameters make of the down projection.
//
//     norm(x) down^T = (x - mean) / deviation (norm_weight down)^T + norm_bias down^T
//
// In 16 bits norm_weight is folded into the packed down projection, and x meets it as it is:
//     x (norm_weight down)^T - mean sums,  sums[b] = sum over d of norm_weight[d] down[b, d], as it was rounded
// so the mean's part cancels whatever the mean is. Floats are normalized on their way to the product instead: there the
// sums' own rounding would show beside a large mean.
#pragma once
#include "kernels/adapter.h"
#include "kernels/cuda/packing.h"

namespace petl::cuda {

struct Norm {
  Weights weight, bias;  // [1, D]; null data: none
  float epsilon;

  __host__ __device__ bool exists() const { return weight.data != nullptr; }
};

template <class T>
constexpr bool kFolds = sizeof(T) == 2;

struct AdapterVectors {
  float* norm_weight;  // [D]; ones without a norm
  float* up_bias;      // [D]
  // For each hidden unit, as many as are packed:
  float* sums;         // see above; zeros without a norm
  float* biases;       // down_bias + norm_bias down^T
  float* mean_weight;  // mean over d of norm_weight[d] down[b, d]
  float* unscale;      // [1], by which packed weights are smaller than they should be

  static AdapterVectors in(Partition& partition, const AdapterSizes& size) {
    const int64_t units = round_up(size.B, kUnitColumns);
    return {partition.take<float>(size.D), partition.take<float>(size.D), partition.take<float>(units),
            partition.take<float>(units),  partition.take<float>(units),  partition.take<float>(1)};
  }
};

template <class T>
__device__ __forceinline__ float rounded(float value) {
  const float values[8] = {value};
  float kept[8];
  unpack(pack<T>(values), kept);
  return kept[0];
}

// Makes them: a block per hidden unit, and one for every 8 kPackThreads columns.
struct AdapterRows {
  Weights down, down_bias, up_bias;
  Norm norm;
  AdapterVectors vectors;

  int units() const { return static_cast<int>(round_up(down.rows, kUnitColumns)); }
  int blocks() const { return units() + static_cast<int>(divide_up(down.columns, 8 * kPackThreads)); }

  template <class T>
  __device__ __forceinline__ void run(int block) const {
    const int units = (down.rows + kUnitColumns - 1) / kUnitColumns * kUnitColumns;
    if (block < units) {
      make_unit<T>(block);
    } else {
      make_rows(8 * ((block - units) * kPackThreads + static_cast<int>(threadIdx.x)));
    }
  }

 private:
  __device__ __forceinline__ static void load_row(const Weights& row, int column, float (&values)[8]) {
    unpack(row.load(0, column), row.dtype, values);
  }

  __device__ __forceinline__ void make_rows(int column) const {
    if (column >= down.columns) return;
    float values[8];
    load_row(up_bias, column, values);
    store(vectors.up_bias + column, pack<float>(values));
    if (norm.exists()) {
      load_row(norm.weight, column, values);
    } else {
#pragma unroll
      for (float& value : values) value = 1;
    }
    store(vectors.norm_weight + column, pack<float>(values));
  }

  // Units beyond the last have no weights: zeros.
  template <class T>
  __device__ __forceinline__ void make_unit(int unit) const {
    double* const scratch = reinterpret_cast<double*>(shared_memory());
    const float scale = norm.exists() ? gain_scale<T>(norm.weight, reinterpret_cast<float*>(scratch)) : 1;
    __syncthreads();
    double folded = 0, weighted = 0, biased = 0;
    for (int column = 8 * threadIdx.x; norm.exists() && column < down.columns; column += 8 * kPackThreads) {
      float values[8], weight[8], bias[8];
      unpack(down.load(unit, column), down.dtype, values);
      load_row(norm.weight, column, weight);
      load_row(norm.bias, column, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        folded += rounded<T>(values[i] * (weight[i] * scale));
        weighted += double{values[i]} * weight[i];
        biased += double{values[i]} * bias[i];
      }
    }
    folded = sum_block(folded, scratch);
    weighted = sum_block(weighted, scratch);
    biased = sum_block(biased, scratch);
    if (threadIdx.x > 0) return;
    const double bias = unit < down.rows ? load_scalar(down_bias.data, down_bias.dtype, unit) : 0;
    vectors.sums[unit] = static_cast<float>(folded);
    vectors.biases[unit] = static_cast<float>(biased + bias);
    vectors.mean_weight[unit] = static_cast<float>(weighted / down.columns);
    if (unit == 0) *vectors.unscale = 1 / scale;
  }
};

inline AdapterRows adapter_rows(const AdapterInputs& inputs, const AdapterVectors& vectors) {
  const auto [R, D, B] = inputs.size;
  const Norm norm{weights_of(inputs.norm_weight, 1, D), weights_of(inputs.norm_bias, 1, D), inputs.epsilon};
  return {weights_of(inputs.down, B, D), weights_of(inputs.down_bias, 1, B), weights_of(inputs.up_bias, 1, D), norm,
          vectors};
}

}  // namespace petl::cuda
