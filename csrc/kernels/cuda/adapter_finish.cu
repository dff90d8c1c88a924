#include "kernels/cuda/adapter_finish.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/slab_sums.h"

namespace petl::cuda {
namespace {

// A block has a strip of columns of D: what device memory gives at once, so that strips enough for a GPU waste nothing.
constexpr int kColumns = 8;
constexpr int kThreads = 512, kWarps = kThreads / 32;
// Between the strip's halves in shared memory, which the threads of a warp write together: other banks.
constexpr int kPadding = 16;

// Four neighboring elements from `index` on, which is a multiple of four.
__device__ __forceinline__ void load_four(const ConstRows& rows, int64_t index, float (&values)[4]) {
  const int bytes = rows.dtype == DType::float32 ? 4 : 2;
  const char* const address = static_cast<const char*>(rows.data) + index * bytes;
  if (reinterpret_cast<uintptr_t>(address) % (4 * bytes) != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = load_scalar(rows.data, rows.dtype, index + i);
  } else if (rows.dtype == DType::float32) {
    const float4 vector = *reinterpret_cast<const float4*>(address);
    values[0] = vector.x, values[1] = vector.y, values[2] = vector.z, values[3] = vector.w;
  } else {
    const uint2 vector = *reinterpret_cast<const uint2*>(address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = i < 2 ? vector.x : vector.y, bits = i % 2 == 0 ? pair & 0xffff : pair >> 16;
      values[i] = rows.dtype == DType::bfloat16 ? __uint_as_float(bits << 16) : unpack_float16(bits).x;
    }
  }
}

struct FinishTask {
  AdapterBackward args;
  AdapterSums sums;
  int strips;  // none, if no weight has a gradient
};

// Two threads have the strip's columns of one hidden unit, four each.
class Strip {
 public:
  __device__ __forceinline__ Strip(const FinishTask& task, int strip)
      : args_(task.args),
        sums_(task.sums),
        D_(args_.inputs.size.D),
        B_(static_cast<int>(args_.inputs.size.B)),
        first_column_(int64_t{kColumns} * strip),
        column_(first_column_ + own_column()),
        shared_(reinterpret_cast<float*>(shared_memory())) {}

  //     ddown = sums norm_weight + ddown_bias norm_bias^T
  //     dnorm_weight = sum_b down sums    dnorm_bias = sum_b down ddown_bias
  __device__ __forceinline__ void finish_down() {
    add_bias_sums();
    __syncthreads();
    const AdapterInputs& inputs = args_.inputs;
    const bool has_norm = inputs.norm_weight.data;
    float weight[4] = {1, 1, 1, 1}, bias[4] = {}, dweight[4] = {}, dbias[4] = {};
    if (has_norm) {
      load_four(inputs.norm_weight, column_, weight);
      load_four(inputs.norm_bias, column_, bias);
    }
    for (int b = first_unit(); b < B_; b += kThreads / 2) {
      float down[4] = {}, result[4];
      if (has_norm) load_four(inputs.down, b * inputs.down.stride + column_, down);
      const float4 sum = add_slabs<float4>(sums_.down + b * D_ + column_, sums_.slabs, B_ * D_);
      const float bias_sum = shared_[b], values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        result[i] = has_norm ? values[i] * weight[i] + bias_sum * bias[i] : values[i];
        dweight[i] += down[i] * values[i];
        dbias[i] += down[i] * bias_sum;
      }
      const float4 row = {result[0], result[1], result[2], result[3]};
      *reinterpret_cast<float4*>(args_.ddown + b * D_ + column_) = row;
    }
    if (!has_norm) return;
    sum_units(dweight, args_.dnorm_weight);
    sum_units(dbias, args_.dnorm_bias);
  }

  //     dup = scale sums^T    dup_bias = scale (sum of dout)
  __device__ __forceinline__ void finish_up() {
    const AdapterInputs& inputs = args_.inputs;
    const float gain = inputs.gain.data ? load_scalar(inputs.gain.data, inputs.gain.dtype, 0) : 1;
    const float scale = inputs.scale * gain;
    const int half = 4 * B_ + kPadding;
    for (int b = first_unit(); b < B_; b += kThreads / 2) {
      const float4 sum = add_slabs<float4>(sums_.up + b * D_ + column_, sums_.slabs, B_ * D_);
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) shared_[own_column() / 4 * half + i * B_ + b] = scale * values[i];
    }
    if (threadIdx.x < kColumns) {
      const int64_t column = first_column_ + threadIdx.x;
      args_.dup_bias[column] = scale * add_slabs<float>(sums_.dout + column, sums_.slabs, D_);
    }
    __syncthreads();
    // The strip's rows of dup lie back to back, as their halves do here.
    float4* const target = reinterpret_cast<float4*>(args_.dup + first_column_ * B_);
    for (int i = threadIdx.x; i < 2 * B_; i += kThreads) {
      target[i] = reinterpret_cast<float4*>(shared_)[i < B_ ? i : i + kPadding / 4];
    }
  }

 private:
  __device__ __forceinline__ static int first_unit() { return threadIdx.x / 2; }
  __device__ __forceinline__ static int own_column() { return threadIdx.x % 2 * 4; }

  // shared_[b] is ddown_bias[b], in every block anew.
  __device__ __forceinline__ void add_bias_sums() const {
    for (int b = threadIdx.x; b < B_; b += kThreads) {
      shared_[b] = add_slabs<float>(sums_.dhidden + b, sums_.slabs, B_);
      if (first_column_ == 0) args_.ddown_bias[b] = shared_[b];
    }
  }

  // The sums over all hidden units, for the strip's columns.
  __device__ __forceinline__ void sum_units(const float (&values)[4], float* target) const {
    float* const sums = shared_ + B_;  // [kWarps, kColumns]
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = values[i];
#pragma unroll
      for (int lanes = 16; lanes > 1; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (threadIdx.x % 32 < 2) sums[threadIdx.x / 32 * kColumns + own_column() + i] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= kColumns) return;
    float total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * kColumns + threadIdx.x];
    target[first_column_ + threadIdx.x] = total;
  }

  const AdapterBackward& args_;
  const AdapterSums& sums_;
  const int64_t D_;
  const int B_;
  const int64_t first_column_, column_;
  float* const shared_;
};

// A block for each strip of ddown, then for each of dup, and one for dgain, if that is wanted.
__global__ void __launch_bounds__(kThreads) adapter_finish(const __grid_constant__ FinishTask task) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < task.strips) {
    Strip(task, block).finish_down();
  } else if (block < 2 * task.strips) {
    Strip(task, block - task.strips).finish_up();
  } else {
    double share = 0;
    for (int64_t i = threadIdx.x; i < task.sums.blocks; i += kThreads) share += task.sums.shares[i];
    share = sum_block(share, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) *task.args.dgain = static_cast<float>(share);
  }
}

}  // namespace

int finish_adapter(Queue queue, const AdapterBackward& args, const AdapterSums& sums) {
  const auto [R, D, B] = args.inputs.size;
  const int strips = args.ddown ? static_cast<int>(divide_up(D, kColumns)) : 0;
  const int blocks = 2 * strips + (args.dgain ? 1 : 0);
  if (blocks == 0) return 0;
  const int64_t of_down = B + kWarps * kColumns, of_up = kColumns * B + kPadding;
  const int64_t floats = of_down > of_up ? of_down : of_up;
  const Grid grid{dim3(blocks), kThreads, static_cast<int>(floats * sizeof(float))};
  return launch(queue, grid, &adapter_finish, FinishTask{args, sums, strips});
}

}  // namespace petl::cuda
