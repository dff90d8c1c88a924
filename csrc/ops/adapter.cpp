#include "kernels/cuda/adapter.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/check.h"
#include "ops/cpu.h"
#ifdef PETL_WITH_CUDA
#include "ops/cuda.h"
#endif
#include "ops/dropout.h"
#include "ops/limits.h"

namespace petl {
namespace {

using OptionalTensor = std::optional<Tensor>;

void run(const Cpu&, const AdapterForward& args, const Tensor&, const OptionalTensor&) {
  cpu_kernels().adapter_forward(args, &parallel_for);
}

void run(const Cpu&, const AdapterBackward& args, const Tensor&) {
  cpu_kernels().adapter_backward(args, &parallel_for);
}

#ifdef PETL_WITH_CUDA
void run(const Cuda& device, const AdapterForward& args, const Tensor& like, const OptionalTensor& packed) {
  if (packed) device.holds({"adapter", "packed", *packed});
  const ForwardMemory memory("adapter", packed, cuda::adapter_packed_bytes(args), cuda::adapter_forward_workspace(args),
                             like);
  device.check("adapter",
               cuda::adapter_forward(args, memory.packed(), packed.has_value(), memory.workspace(), device.queue()));
}

void run(const Cuda& device, const AdapterBackward& args, const Tensor& like) {
  const Tensor workspace = new_bytes(like, cuda::adapter_backward_workspace(args));
  device.check("adapter", cuda::adapter_backward(args, workspace.mutable_data_ptr(), device.queue()));
}
#endif

AdapterActivation activation_named(const std::string& name) {
  PETL_REQUIRE(name == "relu" || name == "gelu" || name == "silu",
               "adapter: activation must be relu, gelu or silu, got ", name);
  return name == "relu" ? AdapterActivation::relu : name == "gelu" ? AdapterActivation::gelu : AdapterActivation::silu;
}

// What forward and backward share, as the caller gave it.
struct AdapterTensors {
  const Tensor& x;
  const OptionalTensor &norm_weight, &norm_bias;
  const Tensor &down, &down_bias, &up, &up_bias;
  const OptionalTensor& gain;

  AdapterSizes check_sizes() const {
    PETL_REQUIRE(x.dim() > 0 && x.size(x.dim() - 1) > 0,
                 "adapter: x must have shape [..., D] with a width D above zero, got ", shape_text(x.sizes()));
    const int64_t D = x.size(x.dim() - 1);
    PETL_REQUIRE(down.dim() == 2 && down.size(0) > 0 && down.size(1) == D, "adapter: down must have shape [B, ", D,
                 "], got ", shape_text(down.sizes()));
    const int64_t B = down.size(0);
    Argument{"adapter", "down_bias", down_bias}.has_shape({B});
    Argument{"adapter", "up", up}.has_shape({D, B});
    Argument{"adapter", "up_bias", up_bias}.has_shape({D});
    PETL_REQUIRE(norm_weight.has_value() == norm_bias.has_value(),
                 "adapter: norm_weight and norm_bias must be given both or neither");
    if (norm_weight) {
      Argument{"adapter", "norm_weight", *norm_weight}.has_shape({D});
      Argument{"adapter", "norm_bias", *norm_bias}.has_shape({D});
    }
    if (gain) Argument{"adapter", "gain", *gain}.has_shape({1});
    return {x.numel() / D, D, B};
  }
};

// A weight as rows; an absent one has no data.
template <class Device>
class WeightRows {
 public:
  WeightRows(const Device& device, const char* name, const OptionalTensor& weight) {
    if (!weight) return;
    const Argument argument{"adapter", name, *weight};
    device.holds(argument);
    rows_.emplace(argument);
  }

  ConstRows view() const { return rows_ ? rows_->view() : ConstRows{nullptr, 0, DType::float32}; }

 private:
  std::optional<RowsOf> rows_;
};

// An activation shaped as x; in its dtype too where the device, or the caller, must have it so.
template <class Device>
ActivationRows<Device> rows_like_x(const Device& device, const char* name, const Tensor& tensor, const Tensor& x,
                                   bool in_its_dtype = true) {
  const Argument argument{"adapter", name, tensor};
  argument.has_shape(x.sizes());
  device.holds(argument);
  const bool may_differ = Device::kMixesDtypes && !in_its_dtype;
  PETL_REQUIRE(may_differ || tensor.scalar_type() == x.scalar_type(), "adapter: ", name, " must have the dtype of x, ",
               torch::headeronly::toString(x.scalar_type()), ", got ",
               torch::headeronly::toString(tensor.scalar_type()));
  return {argument, false};
}

// The checked inputs, and whatever had to be copied for the kernels to read them.
template <class Device>
class AdapterInputRows {
 public:
  AdapterInputRows(const Device& device, const AdapterTensors& tensors, const std::string& activation, double scale,
                   double eps)
      : size_(tensors.check_sizes()),
        activation_(activation_named(activation)),
        x_(rows_like_x(device, "x", tensors.x, tensors.x)),
        norm_weight_(device, "norm_weight", tensors.norm_weight),
        norm_bias_(device, "norm_bias", tensors.norm_bias),
        down_(device, "down", tensors.down),
        down_bias_(device, "down_bias", tensors.down_bias),
        up_(device, "up", tensors.up),
        up_bias_(device, "up_bias", tensors.up_bias),
        gain_(device, "gain", tensors.gain),
        scale_(static_cast<float>(scale)),
        epsilon_(static_cast<float>(eps)) {
    device.supports("adapter", cuda::kAdapterLimits, size_.D, size_.B);
  }

  const AdapterSizes& size() const { return size_; }

  AdapterInputs view(const Dropout& dropout, bool rounds_x) const {
    return {
        .size = size_,
        .activation = activation_,
        .x = x_.view(),
        .norm_weight = norm_weight_.view(),
        .norm_bias = norm_bias_.view(),
        .down = down_.view(),
        .down_bias = down_bias_.view(),
        .up = up_.view(),
        .up_bias = up_bias_.view(),
        .gain = gain_.view(),
        .scale = scale_,
        .epsilon = epsilon_,
        .dropout = dropout,
        .rounds_x = rounds_x,
    };
  }

 private:
  AdapterSizes size_;
  AdapterActivation activation_;
  ActivationRows<Device> x_;
  WeightRows<Device> norm_weight_, norm_bias_, down_, down_bias_, up_, up_bias_, gain_;
  float scale_, epsilon_;
};

// What backward is given of the hidden units, [R, B], has no more digits than the factors of products.
ScalarType raw_dtype(const Tensor& x, bool rounds_x) {
  return rounds_x || x.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

template <class Device>
std::tuple<Tensor, Tensor> adapter_forward(const Tensor& x, OptionalTensor residual, OptionalTensor norm_weight,
                                           OptionalTensor norm_bias, const Tensor& down, const Tensor& down_bias,
                                           const Tensor& up, const Tensor& up_bias, OptionalTensor gain, double scale,
                                           double eps, std::string activation, OptionalTensor packed, double dropout,
                                           OptionalTensor seeds, bool keep_raw, bool rounds_x) {
  const AdapterTensors tensors{x, norm_weight, norm_bias, down, down_bias, up, up_bias, gain};
  const Device device(x);
  const AdapterInputRows<Device> rows(device, tensors, activation, scale, eps);
  may_round_x<Device>("adapter", rounds_x);
  PETL_REQUIRE(!keep_raw || Device::kMixesDtypes, "adapter: keep_raw must be False on a GPU, got True");
  std::optional<ActivationRows<Device>> residual_rows;
  if (residual) residual_rows.emplace(rows_like_x(device, "residual", *residual, x, false));
  const ScalarType dtype = residual ? residual->scalar_type() : rounds_x ? ScalarType::BFloat16 : x.scalar_type();
  const Result out(x, dtype, false, true);
  const int64_t kept[] = {rows.size().R, rows.size().B};
  const Tensor raw = new_tensor(x, keep_raw ? IntHeaderOnlyArrayRef(kept) : kNotNeeded, raw_dtype(x, rounds_x));
  run(device,
      AdapterForward{
          .inputs = rows.view(dropout_of(device, "adapter", dropout, seeds), rounds_x),
          .residual = residual_rows ? residual_rows->view() : ConstRows{nullptr, 0, DType::float32},
          .out = out.rows(),
          .raw = {keep_raw ? raw.mutable_data_ptr() : nullptr, Argument{"adapter", "raw", raw}.dtype()},
      },
      x, packed);
  return {out.tensor(), raw};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& dout, const Tensor& x, OptionalTensor norm_weight, OptionalTensor norm_bias, const Tensor& down,
    const Tensor& down_bias, const Tensor& up, const Tensor& up_bias, OptionalTensor gain, double scale, double eps,
    std::string activation, bool residual_is_input, bool needs_dx, bool needs_dweights, bool needs_dgain,
    double dropout, OptionalTensor seeds, OptionalTensor raw, bool rounds_x) {
  const AdapterTensors tensors{x, norm_weight, norm_bias, down, down_bias, up, up_bias, gain};
  const Device device(x);
  const AdapterInputRows<Device> rows(device, tensors, activation, scale, eps);
  may_round_x<Device>("adapter", rounds_x);
  const ActivationRows<Device> dout_rows = rows_like_x(device, "dout", dout, x, residual_is_input);
  PETL_REQUIRE(!raw || Device::kMixesDtypes, "adapter: raw must be None on a GPU, got a tensor");
  if (raw) {
    const Argument argument{"adapter", "raw", *raw};
    argument.has_shape({rows.size().R, rows.size().B});
    argument.is_as_forward_returned(raw_dtype(x, rounds_x));
    device.holds(argument);
  }
  const Result dx(x, false, needs_dx);
  // Empty ones need a tensor to be like.
  const bool needs_dnorm = needs_dweights && norm_weight;
  const WeightGradient dnorm_weight(norm_weight.value_or(down_bias), needs_dnorm),
      dnorm_bias(norm_bias.value_or(down_bias), needs_dnorm), ddown(down, needs_dweights),
      ddown_bias(down_bias, needs_dweights), dup(up, needs_dweights), dup_bias(up_bias, needs_dweights),
      dgain(gain.value_or(down_bias), needs_dgain && gain);
  run(device,
      AdapterBackward{
          .inputs = rows.view(dropout_of(device, "adapter", dropout, seeds), rounds_x),
          .dout = dout_rows.view(),
          .residual_is_input = residual_is_input,
          .dx = dx.rows(),
          .dnorm_weight = dnorm_weight.data(),
          .dnorm_bias = dnorm_bias.data(),
          .ddown = ddown.data(),
          .ddown_bias = ddown_bias.data(),
          .dup = dup.data(),
          .dup_bias = dup_bias.data(),
          .dgain = dgain.data(),
          .raw = raw ? RowsOf({"adapter", "raw", *raw}).view() : ConstRows{nullptr, 0, DType::float32},
      },
      x);
  return {dx.tensor(),         dnorm_weight.tensor(), dnorm_bias.tensor(), ddown.tensor(),
          ddown_bias.tensor(), dup.tensor(),          dup_bias.tensor(),   dgain.tensor()};
}

#ifdef PETL_WITH_CUDA
// `like` [1, D] has the dtype of the activations.
Tensor adapter_pack(const Tensor& like, OptionalTensor norm_weight, OptionalTensor norm_bias, const Tensor& down,
                    const Tensor& down_bias, const Tensor& up, const Tensor& up_bias) {
  const OptionalTensor no_gain;
  const AdapterTensors tensors{like, norm_weight, norm_bias, down, down_bias, up, up_bias, no_gain};
  const Cuda device(like);
  const AdapterInputRows<Cuda> rows(device, tensors, "relu", 1, 0);
  const AdapterForward args{rows.view({}, false), {nullptr, 0, DType::float32}, {}};
  const Tensor packed = new_bytes(like, cuda::adapter_packed_bytes(args));
  device.check("adapter", cuda::adapter_pack(args, packed.mutable_data_ptr(), device.queue()));
  return packed;
}
#endif

}  // namespace

#ifndef PETL_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(petl_ext, m) { m.def("adapter_cuda_limits() -> (int, int, int)"); }

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CompositeExplicitAutograd, m) {
  m.impl("adapter_cuda_limits", TORCH_BOX(&cuda_limits<cuda::kAdapterLimits>));
}

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CPU, m) {
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward<Cpu>));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward<Cpu>));
}
#endif

#ifdef PETL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(PETL_CUDA_LIBRARY, PETL_CUDA_KEY, m) {
  m.impl("adapter_pack", TORCH_BOX(&adapter_pack));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward<Cuda>));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward<Cuda>));
}
#endif

}  // namespace petl
