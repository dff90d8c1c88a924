#include "kernels/cuda/attention_pool.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "ops/check.h"
#include "ops/cpu.h"
#ifdef PETL_WITH_CUDA
#include "ops/cuda.h"
#endif
#include "ops/limits.h"

namespace petl {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A softmax over nothing has no value.
void check_that_tokens_take_part(const AttentionPoolInputs& args) {
  const auto [B, N, D, H] = args.size;
  for (int64_t sample = 0; args.mask && sample < B; ++sample) {
    const uint8_t* mask = args.mask + sample * N;
    PETL_REQUIRE(std::any_of(mask, mask + N, [](uint8_t takes_part) { return takes_part != 0; }),
                 "attention_pool: mask must let at least one token of each sample take part (True), got none for "
                 "sample ",
                 sample);
  }
}

void run(const Cpu&, const AttentionPoolForward& args, const Tensor&) {
  check_that_tokens_take_part(args.inputs);
  cpu_kernels().attention_pool_forward(args, &parallel_for);
}

void run(const Cpu&, const AttentionPoolBackward& args, const Tensor&) {
  cpu_kernels().attention_pool_backward(args, &parallel_for);
}

#ifdef PETL_WITH_CUDA
void run(const Cuda& device, const AttentionPoolForward& args, const Tensor& like) {
  const Tensor workspace = new_bytes(like, cuda::attention_pool_forward_workspace(args));
  device.check("attention_pool", cuda::attention_pool_forward(args, workspace.mutable_data_ptr(), device.queue()));
}

void run(const Cuda& device, const AttentionPoolBackward& args, const Tensor& like) {
  const Tensor workspace = new_bytes(like, cuda::attention_pool_backward_workspace(args));
  device.check("attention_pool", cuda::attention_pool_backward(args, workspace.mutable_data_ptr(), device.queue()));
}
#endif

// What forward and backward share, as the caller gave it.
struct AttentionPoolTensors {
  const Tensor &visual, &query;
  const OptionalTensor& mask;

  AttentionPoolSizes check_sizes() const {
    PETL_REQUIRE(visual.dim() == 3 && visual.size(1) > 0 && visual.size(2) > 0,
                 "attention_pool: visual must have shape [B, N, D] with N and D above zero, got ",
                 shape_text(visual.sizes()));
    const int64_t B = visual.size(0), N = visual.size(1), D = visual.size(2);
    PETL_REQUIRE(query.dim() == 3 && query.size(0) == B && query.size(1) > 0 && query.size(2) == D,
                 "attention_pool: query must have shape [", B, ", H, ", D, "] with H above zero, got ",
                 shape_text(query.sizes()));
    if (mask) {
      Argument{"attention_pool", "mask", *mask}.has_shape({B, N});
      PETL_REQUIRE(mask->scalar_type() == ScalarType::Bool,
                   "attention_pool: mask must be bool, True where a token takes part, got ",
                   torch::headeronly::toString(mask->scalar_type()));
    }
    return {B, N, D, query.size(1)};
  }
};

template <class Device>
Argument held_by(const Device& device, const char* name, const Tensor& tensor) {
  const Argument argument{"attention_pool", name, tensor};
  device.holds(argument);
  return argument;
}

// The tokens where they lie, if only each row is contiguous: slices of a sample's tokens are not copied.
class TokensOf {
 public:
  TokensOf(const Argument& argument, int64_t alignment)
      : dtype_(argument.dtype()), tensor_(as_rows(argument.tensor, alignment)) {}

  ConstRows rows() const { return {tensor_.const_data_ptr(), tensor_.stride(1), dtype_}; }
  int64_t sample() const { return tensor_.stride(0); }

 private:
  static Tensor as_rows(const Tensor& tensor, int64_t alignment) {
    const auto is_aligned = [&](int64_t bytes) { return bytes % alignment == 0; };
    const bool in_place = tensor.stride(2) == 1 && is_aligned(reinterpret_cast<int64_t>(tensor.const_data_ptr())) &&
                          is_aligned(tensor.stride(0) * tensor.element_size()) &&
                          is_aligned(tensor.stride(1) * tensor.element_size());
    if (in_place) return tensor;
    Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
    return torch::stable::copy_(copy, tensor);
  }

  DType dtype_;
  Tensor tensor_;
};

// The checked inputs, and whatever had to be copied for the kernels to read them.
template <class Device>
class AttentionPoolInputRows {
 public:
  AttentionPoolInputRows(const Device& device, const AttentionPoolTensors& tensors, double scale)
      : size_(tensors.check_sizes()),
        visual_(held_by(device, "visual", tensors.visual), Device::kRowAlignment),
        query_(held_by(device, "query", tensors.query), Device::kRowAlignment),
        scale_(static_cast<float>(scale)) {
    device.supports("attention_pool", cuda::kAttentionPoolLimits, size_.D, size_.H);
    if (tensors.mask) mask_ = torch::stable::contiguous(held_by(device, "mask", *tensors.mask).tensor);
  }

  AttentionPoolInputs view() const {
    const void* mask = mask_ ? mask_->const_data_ptr() : nullptr;
    return {size_, visual_.rows(), visual_.sample(), query_.view(), static_cast<const uint8_t*>(mask), scale_};
  }

  std::array<int64_t, 3> pooled_shape() const { return {size_.B, size_.H, size_.D}; }
  std::array<int64_t, 3> statistics_shape() const { return {2, size_.B, size_.H}; }

 private:
  AttentionPoolSizes size_;
  TokensOf visual_;
  RowsOf query_;
  std::optional<Tensor> mask_;
  float scale_;
};

template <class Device>
std::tuple<Tensor, Tensor> attention_pool_forward(const Tensor& visual, const Tensor& query, OptionalTensor mask,
                                                  double scale) {
  const Device device(visual);
  const AttentionPoolInputRows<Device> rows(device, {visual, query, mask}, scale);
  const Tensor pooled = torch::stable::new_empty(visual, rows.pooled_shape());
  const Tensor statistics = new_floats(visual, rows.statistics_shape());
  run(device,
      AttentionPoolForward{rows.view(),
                           {pooled.mutable_data_ptr(), rows.view().visual.dtype},
                           static_cast<float*>(statistics.mutable_data_ptr())},
      visual);
  return {pooled, statistics};
}

// The gradient of pooled, or pooled itself: in the dtype of visual.
template <class Device>
RowsOf pooled_rows(const Device& device, const char* name, const Tensor& tensor, IntHeaderOnlyArrayRef shape,
                   const Tensor& visual) {
  const Argument argument = held_by(device, name, tensor);
  argument.has_shape(shape);
  PETL_REQUIRE(tensor.scalar_type() == visual.scalar_type(), "attention_pool: ", name,
               " must have the dtype of visual, ", torch::headeronly::toString(visual.scalar_type()), ", got ",
               torch::headeronly::toString(tensor.scalar_type()));
  return RowsOf(argument, Device::kRowAlignment);
}

template <class Device>
std::tuple<Tensor, Tensor> attention_pool_backward(const Tensor& dpooled, const Tensor& visual, const Tensor& query,
                                                   OptionalTensor mask, const Tensor& pooled, const Tensor& statistics,
                                                   double scale, bool needs_dvisual, bool needs_dquery) {
  const Device device(visual);
  const AttentionPoolInputRows<Device> rows(device, {visual, query, mask}, scale);
  const RowsOf dpooled_rows = pooled_rows(device, "dpooled", dpooled, rows.pooled_shape(), visual);
  const RowsOf saved_rows = pooled_rows(device, "pooled", pooled, rows.pooled_shape(), visual);
  const Argument saved = held_by(device, "statistics", statistics);
  saved.has_shape(rows.statistics_shape());
  saved.is_as_forward_returned(ScalarType::Float);
  const Result dvisual(visual, false, needs_dvisual);
  const WeightGradient dquery(query, needs_dquery);
  run(device,
      AttentionPoolBackward{rows.view(), dpooled_rows.view(), saved_rows.view(),
                            static_cast<const float*>(statistics.const_data_ptr()), dvisual.rows(), dquery.data()},
      visual);
  return {dvisual.tensor(), dquery.tensor()};
}

}  // namespace

#ifndef PETL_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(petl_ext, m) { m.def("attention_pool_cuda_limits() -> (int, int, int)"); }

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CompositeExplicitAutograd, m) {
  m.impl("attention_pool_cuda_limits", TORCH_BOX(&cuda_limits<cuda::kAttentionPoolLimits>));
}

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&attention_pool_forward<Cpu>));
  m.impl("attention_pool_backward", TORCH_BOX(&attention_pool_backward<Cpu>));
}
#endif

#ifdef PETL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(PETL_CUDA_LIBRARY, PETL_CUDA_KEY, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&attention_pool_forward<Cuda>));
  m.impl("attention_pool_backward", TORCH_BOX(&attention_pool_backward<Cuda>));
}
#endif

}  // namespace petl
