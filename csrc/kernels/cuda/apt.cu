// Prompt diffusion on CUDA. Forward is one launch; backward is three: the rows' gradients, slabs of the weights'
// gradients, and the sums of the slabs.
#include "kernels/cuda/apt.h"
#include "kernels/cuda/sandwich.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {
namespace {

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
template <class T>
struct AptForwardOp {
  using Element = T;
  using Kept = typename KeptOf<T>::Type;
  static constexpr Order kFirstOrder = Order::columns, kSecondOrder = Order::depth;
  static constexpr bool kSplits = sizeof(T) == 2, kTransforms = false;
  static constexpr int most_resident_blocks(int) { return 3; }

  const T* left;  // x
  int64_t left_stride;
  Weights first;   // keys
  Weights second;  // prompts
  int64_t R;
  int D, inner;
  Activation activation;
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

  template <class Block>
  __device__ __forceinline__ void begin(const Block&) const {}
  template <class Block>
  __device__ __forceinline__ void end(const Block&, const Terms&, double) const {}
  __device__ __forceinline__ bool writes_rows() const { return true; }
  __device__ __forceinline__ bool multiplies() const { return true; }
  // Rounded keys flip the ReLU's mask: the product takes what rounding leaves out as well. Softmax has no mask.
  __device__ __forceinline__ bool splits() const {
    return activation == Activation::relu && first.dtype == DType::float32;
  }

  // Finds the gates. For softmax the raw scores become scores / gate, the exponentials; for ReLU they stay as they are.
  template <class Block, class SumsOfThread>
  __device__ __forceinline__ void activate_rows(SumsOfThread& sums, const Block& block,
                                                float (&gates)[Block::kThreadRows]) const {
    float best[Block::kThreadRows];
#pragma unroll
    for (float& value : best) value = -INFINITY;
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i < inner) best[line] = Max()(best[line], values[i]);
      }
    });
    block.reduce_rows(best, Max());
    if (activation == Activation::relu) {
#pragma unroll
      for (int line = 0; line < Block::kThreadRows; ++line) gates[line] = best[line] < 0 ? 0 : best[line];
      return;
    }
    float total[Block::kThreadRows] = {};
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

  template <class Block, class SumsOfThread>
  __device__ __forceinline__ Terms activate(SumsOfThread& sums, const Block& block, Tile<T> hidden) const {
    float gates[Block::kThreadRows], inverse[Block::kThreadRows];
    activate_rows(sums, block, gates);
    const bool relu = activation == Activation::relu;
    Terms terms;
    terms.scale = expf(load_scalar(log_scale, log_scale_dtype, 0));
#pragma unroll
    for (int line = 0; line < Block::kThreadRows; ++line) {
      // Below the smallest normal float gate^2 is zero, and so is what the inverse would be multiplied by. A NaN comes
      // through the factor.
      inverse[line] = gates[line] >= 1.2e-38f ? 1 / gates[line] : 0;
      terms.factor[line] = terms.scale * gates[line] * gates[line];
      if (block.column_warp() == 0 && threadIdx.x % 4 == 0 && block.row(line) < R) gate[block.row(line)] = gates[line];
    }
    block.for_each(sums, inner, [&](int line, int column, float (&values)[8]) {
      float normalized[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // Written so that a NaN stays one.
        const float value = relu && values[i] < 0 ? 0 : masked(column + i < inner, values[i]);
        values[i] = relu ? value : value * gates[line];
        normalized[i] = relu ? value * inverse[line] : value;
      }
      store(hidden.data + block.local_row(line) * hidden.stride + column, pack<T>(normalized));
      if (scores && column < kept && block.row(line) < R) {
        store(scores + block.row(line) * kept + column, pack<Kept>(values));
      }
    });
    return terms;
  }

  __device__ __forceinline__ Inputs prefetch(int64_t row, int column) const {
    return load(y + row * y_stride + column);
  }

  __device__ __forceinline__ void write(int64_t row, int column, const float (&products)[8], const Inputs& inputs,
                                        const Terms& terms, int line, double&) const {
    float values[8];
    unpack(inputs, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = terms.scale * values[i] + terms.factor[line] * products[i];
    store(out + row * D + column, pack<T>(values));
  }
};

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

struct AptFinish {
  const float* sums[2];  // [slabs, P D]
  float* targets[2];     // [P D]; null: not wanted
  int slabs;
  int64_t count;
  const double* shares;
  int64_t blocks;
  float* dlog_scale;  // null: not wanted
};

constexpr int kFinishThreads = 256;

__global__ void __launch_bounds__(kFinishThreads) apt_finish(const __grid_constant__ AptFinish task) {
  float* target = task.targets[blockIdx.y];
  const int64_t index = (int64_t{blockIdx.x} * kFinishThreads + threadIdx.x) * 4;
  if (target && index < task.count) add_slabs(task.sums[blockIdx.y], task.slabs, task.count, index, target);
  if (!task.dlog_scale || blockIdx.x + blockIdx.y > 0) return;
  double share = 0;
  for (int64_t block = threadIdx.x; block < task.blocks; block += kFinishThreads) share += task.shares[block];
  share = sum_block(share, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) *task.dlog_scale = static_cast<float>(share);
}

template <class T>
int forward(const AptForward& args, Queue queue) {
  const auto [R, D, P] = args.size;
  AptForwardOp<T> op;
  set_operands(op, args.x, weights_of(args.keys, P, D), weights_of(args.prompts, P, D), R, D, P);
  op.activation = args.activation;
  op.log_scale = args.log_scale.data;
  op.log_scale_dtype = args.log_scale.dtype;
  op.y = static_cast<const T*>(args.y.data);
  op.y_stride = args.y.stride;
  op.out = static_cast<T*>(args.out.data);
  op.gate = args.gate;
  op.scores = static_cast<typename KeptOf<T>::Type*>(args.scores.data);
  op.kept = static_cast<int>(args.size.kept());
  return R > 0 ? launch_sandwich(queue, op) : 0;
}

// What backward keeps between its launches.
template <class T>
struct AptWorkspace {
  int slabs;
  int64_t blocks;
  T* dscores = nullptr;
  T* weighted = nullptr;
  float* sums[2];
  double* shares;
  int64_t bytes;

  AptWorkspace(const AptBackward& args, void* memory) {
    const auto [R, D, P] = args.size;
    const bool of_weights = args.dprompts || args.dkeys;
    Partition partition(memory);
    slabs = R > 0 ? slab_count(R, D, P, 2) : 0;
    blocks = blocks_of_rows<T>(R, P);
    shares = partition.take<double>(blocks);
    if (of_weights) {
      dscores = partition.take<T>(R * args.size.kept());
      weighted = partition.take<T>(R * args.size.kept());
    }
    for (float*& part : sums) part = of_weights ? partition.take<float>(slabs * P * D) : nullptr;
    bytes = partition.bytes();
  }
};

template <class T>
int backward_rows(const AptBackward& args, const AptWorkspace<T>& workspace, Queue queue) {
  const auto [R, D, P] = args.size;
  AptBackwardOp<T> op;
  set_operands(op, args.dout, weights_of(args.prompts, P, D), weights_of(args.keys, P, D), R, D, P);
  op.activation = args.activation;
  op.log_scale = args.log_scale.data;
  op.log_scale_dtype = args.log_scale.dtype;
  op.y = args.dlog_scale ? static_cast<const T*>(args.y.data) : nullptr;
  op.y_stride = args.y.stride;
  op.gate = args.gate;
  op.scores = static_cast<const typename KeptOf<T>::Type*>(args.scores.data);
  op.kept = static_cast<int>(args.size.kept());
  op.dx = static_cast<T*>(args.dx.data);
  op.dy = static_cast<T*>(args.dy.data);
  op.dscores = workspace.dscores;
  op.weighted = workspace.weighted;
  op.shares = workspace.shares;
  return launch_sandwich(queue, op);
}

template <class T>
int backward_weights(const AptBackward& args, const AptWorkspace<T>& workspace, Queue queue) {
  const auto [R, D, P] = args.size;
  const int64_t kept = args.size.kept();
  GradientTask<T> task = {};
  task.R = R;
  task.D = static_cast<int>(D);
  task.inner = static_cast<int>(P);
  task.slabs = workspace.slabs;
  const GradientProblem<T> of_keys{workspace.dscores, kept,    static_cast<const T*>(args.x.data),
                                   args.x.stride,     nullptr, workspace.sums[0],
                                   nullptr,           nullptr};
  const GradientProblem<T> of_prompts{workspace.weighted,
                                      kept,
                                      static_cast<const T*>(args.dout.data),
                                      args.dout.stride,
                                      nullptr,
                                      workspace.sums[1],
                                      nullptr,
                                      nullptr};
  int problems = 0;
  if (args.dkeys) task.problems[problems++] = of_keys;
  if (args.dprompts) task.problems[problems++] = of_prompts;
  return launch_gradients(queue, task, problems);
}

template <class T>
int backward(const AptBackward& args, void* memory, Queue queue) {
  const AptWorkspace<T> workspace(args, memory);
  const bool of_weights = args.dkeys || args.dprompts;
  int error = 0;
  if (args.size.R > 0) {
    error = backward_rows(args, workspace, queue);
    if (!error && of_weights) error = backward_weights(args, workspace, queue);
  }
  if (error || (!of_weights && !args.dlog_scale)) return error;
  const int64_t count = args.size.P * args.size.D;
  const AptFinish task{{workspace.sums[0], workspace.sums[1]},
                       {args.dkeys, args.dprompts},
                       workspace.slabs,
                       count,
                       workspace.shares,
                       workspace.blocks,
                       args.dlog_scale};
  const dim3 blocks(static_cast<unsigned>(of_weights ? divide_up(count, 4 * kFinishThreads) : 1), of_weights ? 2 : 1);
  return launch(queue, {blocks, kFinishThreads, kFinishThreads / 32 * sizeof(double)}, &apt_finish, task);
}

}  // namespace

int apt_forward(const AptForward& args, Queue queue) {
  return with_element(args.x.dtype, [&](auto element) { return forward<decltype(element)>(args, queue); });
}

int64_t apt_backward_workspace(const AptBackward& args) {
  return with_element(args.x.dtype, [&](auto element) { return AptWorkspace<decltype(element)>(args, nullptr).bytes; });
}

int apt_backward(const AptBackward& args, void* workspace, Queue queue) {
  return with_element(args.x.dtype, [&](auto element) { return backward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
