#include "kernels/cuda/apt.h"

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

void run(const Cpu&, const AptForward& args, const Tensor&, const OptionalTensor&, const OptionalTensor&) {
  cpu_kernels().apt_forward(args, &parallel_for);
}

void run(const Cpu&, const AptBackward& args, const Tensor&) { cpu_kernels().apt_backward(args, &parallel_for); }

#ifdef PETL_WITH_CUDA
void* packed_weights(const Cuda& device, const AptForward& args, const Tensor& packed) {
  const Argument argument{"apt", "packed", packed};
  device.holds(argument);
  return bytes_of(argument, cuda::apt_packed_bytes(args), "_pack");
}

int finish(const Cuda& device, const AptForward& args, const OptionalTensor& packed, const Tensor& begun) {
  const Argument argument{"apt", "begun", begun};
  PETL_REQUIRE(packed, "apt: begun must come with the packed weights that apt_begin was given, got none");
  device.holds(argument);
  return cuda::apt_forward(args, packed_weights(device, args, *packed), cuda::AptDone::beginning,
                           bytes_of(argument, cuda::apt_forward_workspace(args), "_begin"), device.queue());
}

void run(const Cuda& device, const AptForward& args, const Tensor& like, const OptionalTensor& packed,
         const OptionalTensor& begun) {
  if (begun) return device.check("apt", finish(device, args, packed, *begun));
  if (packed) device.holds({"apt", "packed", *packed});
  const ForwardMemory memory("apt", packed, cuda::apt_packed_bytes(args), cuda::apt_forward_workspace(args), like);
  const auto done = packed ? cuda::AptDone::packing : cuda::AptDone::nothing;
  device.check("apt", cuda::apt_forward(args, memory.packed(), done, memory.workspace(), device.queue()));
}

void run(const Cuda& device, const AptBackward& args, const Tensor& like) {
  const Tensor workspace = new_bytes(like, cuda::apt_backward_workspace(args));
  device.check("apt", cuda::apt_backward(args, workspace.mutable_data_ptr(), device.queue()));
}
#endif

Activation activation_named(const std::string& name) {
  PETL_REQUIRE(name == "relu" || name == "softmax", "apt: activation must be relu or softmax, got ", name);
  return name == "relu" ? Activation::relu : Activation::softmax;
}

AptSizes check_sizes(const Tensor& x, const Tensor& prompts, const Tensor& keys) {
  const Argument weights{"apt", "prompts", prompts};
  weights.is_matrix("[P, D]");
  const int64_t P = prompts.size(0), D = prompts.size(1);
  PETL_REQUIRE(x.dim() > 0 && x.size(x.dim() - 1) == D, "apt: x must have shape [..., ", D,
               "], as wide as prompts, got ", shape_text(x.sizes()));
  Argument{"apt", "keys", keys}.has_shape({P, D});
  return {x.numel() / D, D, P};
}

AptSizes check_sizes(const Tensor& x, const Tensor& y, const Tensor& prompts, const Tensor& keys,
                     const Tensor& log_scale) {
  const AptSizes size = check_sizes(x, prompts, keys);
  Argument{"apt", "y", y}.has_shape(x.sizes());
  Argument{"apt", "log_scale", log_scale}.has_shape({1});
  return size;
}

// Scores are kept for backward in half the bytes where x and y (or dout) have no more digits themselves. float16 has
// too small a range.
ScalarType kept_dtype(const Tensor& x, const Tensor& y, bool rounds_x) {
  const bool x_is_narrow = rounds_x || x.scalar_type() == ScalarType::BFloat16;
  return x_is_narrow && y.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> apt_forward(const Tensor& x, const Tensor& y, const Tensor& prompts,
                                               const Tensor& keys, const Tensor& log_scale, std::string activation,
                                               bool keep_scores, OptionalTensor packed, double dropout,
                                               OptionalTensor seeds, OptionalTensor begun, bool rounds_x) {
  const AptSizes size = check_sizes(x, y, prompts, keys, log_scale);
  const Argument arguments[] = {{"apt", "x", x},
                                {"apt", "y", y},
                                {"apt", "prompts", prompts},
                                {"apt", "keys", keys},
                                {"apt", "log_scale", log_scale}};
  const Device device(x);
  for (const Argument& argument : arguments) device.holds(argument);
  device.supports("apt", cuda::kAptLimits, size.D, size.P);
  may_round_x<Device>("apt", rounds_x);
  const bool widen = !Device::kMixesDtypes && arguments[0].dtype() != arguments[1].dtype();
  const ActivationRows<Device> x_rows(arguments[0], widen), y_rows(arguments[1], widen);
  const RowsOf prompts_rows(arguments[2]), keys_rows(arguments[3]), log_scale_rows(arguments[4]);
  const Result out(y, widen);
  const Tensor gate = new_floats(y, {size.R});
  const int64_t kept[] = {size.R, size.kept()};
  const Tensor scores =
      new_tensor(y, keep_scores ? IntHeaderOnlyArrayRef(kept) : kNotNeeded, kept_dtype(x, y, rounds_x));
  run(device,
      AptForward{
          .size = size,
          .activation = activation_named(activation),
          .x = x_rows.view(),
          .y = y_rows.view(),
          .prompts = prompts_rows.view(),
          .keys = keys_rows.view(),
          .log_scale = log_scale_rows.view(),
          .out = out.rows(),
          .gate = static_cast<float*>(gate.mutable_data_ptr()),
          .scores = {keep_scores ? scores.mutable_data_ptr() : nullptr, Argument{"apt", "scores", scores}.dtype()},
          .dropout = dropout_of(device, "apt", dropout, seeds),
          .rounds_x = rounds_x,
      },
      x, packed, begun);
  return {out.tensor(), gate, scores};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> apt_backward(
    const Tensor& dout, const Tensor& x, OptionalTensor y, const Tensor& prompts, const Tensor& keys,
    const Tensor& log_scale, const Tensor& gate, const Tensor& scores, std::string activation, bool needs_dx,
    bool needs_dy, bool needs_dprompts, bool needs_dkeys, double dropout, OptionalTensor seeds, bool rounds_x) {
  const AptSizes size = check_sizes(x, dout, prompts, keys, log_scale);
  const Argument kept[] = {{"apt", "gate", gate}, {"apt", "scores", scores}};
  kept[0].has_shape({size.R});
  kept[0].is_as_forward_returned(ScalarType::Float);
  kept[1].has_shape({size.R, size.kept()});
  kept[1].is_as_forward_returned(kept_dtype(x, dout, rounds_x));
  const Argument arguments[] = {{"apt", "dout", dout},       {"apt", "x", x},       {"apt", "y", y ? *y : dout},
                                {"apt", "prompts", prompts}, {"apt", "keys", keys}, {"apt", "log_scale", log_scale}};
  const Device device(x);
  for (const Argument& argument : arguments) device.holds(argument);
  for (const Argument& argument : kept) device.holds(argument);
  device.supports("apt", cuda::kAptLimits, size.D, size.P);
  may_round_x<Device>("apt", rounds_x);
  arguments[2].has_shape(dout.sizes());
  PETL_REQUIRE(arguments[2].dtype() == arguments[0].dtype(), "apt: dout must have the dtype of y");
  const bool widen = !Device::kMixesDtypes && arguments[0].dtype() != arguments[1].dtype();
  const ActivationRows<Device> dout_rows(arguments[0], widen), x_rows(arguments[1], widen), y_rows(arguments[2], widen);
  const RowsOf prompts_rows(arguments[3]), keys_rows(arguments[4]), log_scale_rows(arguments[5]), scores_rows(kept[1]);
  const Result dx(x, widen, needs_dx), dy(dout, widen, needs_dy);
  const WeightGradient dprompts(prompts, needs_dprompts), dkeys(keys, needs_dkeys), dlog_scale(log_scale, bool(y));
  run(device,
      AptBackward{
          .size = size,
          .activation = activation_named(activation),
          .dout = dout_rows.view(),
          .x = x_rows.view(),
          .y = y_rows.view(),
          .prompts = prompts_rows.view(),
          .keys = keys_rows.view(),
          .log_scale = log_scale_rows.view(),
          .gate = static_cast<const float*>(gate.const_data_ptr()),
          .scores = scores_rows.view(),
          .dx = dx.rows(),
          .dy = dy.rows(),
          .dprompts = dprompts.data(),
          .dkeys = dkeys.data(),
          .dlog_scale = dlog_scale.data(),
          .dropout = dropout_of(device, "apt", dropout, seeds),
          .rounds_x = rounds_x,
      },
      x);
  return {dx.tensor(), dy.tensor(), dprompts.tensor(), dkeys.tensor(), dlog_scale.tensor()};
}

#ifdef PETL_WITH_CUDA
// `like` has the dtype of the products.
Tensor apt_pack(const Tensor& like, const Tensor& prompts, const Tensor& keys, std::string activation) {
  const Argument arguments[] = {{"apt", "like", like}, {"apt", "prompts", prompts}, {"apt", "keys", keys}};
  arguments[1].is_matrix("[P, D]");
  arguments[2].has_shape(prompts.sizes());
  const Cuda device(prompts);
  for (const Argument& argument : arguments) device.holds(argument);
  const AptSizes size{1, prompts.size(1), prompts.size(0)};
  device.supports("apt", cuda::kAptLimits, size.D, size.P);
  const RowsOf prompts_rows(arguments[1]), keys_rows(arguments[2]);
  const AptForward args{
      .size = size,
      .activation = activation_named(activation),
      .x = {nullptr, 0, arguments[0].dtype()},
      .prompts = prompts_rows.view(),
      .keys = keys_rows.view(),
  };
  const Tensor packed = new_bytes(prompts, cuda::apt_packed_bytes(args));
  device.check("apt", cuda::apt_pack(args, packed.mutable_data_ptr(), device.queue()));
  return packed;
}

Tensor apt_begin(const Tensor& x, const Tensor& prompts, const Tensor& keys, std::string activation,
                 const Tensor& packed) {
  const AptSizes size = check_sizes(x, prompts, keys);
  const Argument arguments[] = {{"apt", "x", x}, {"apt", "prompts", prompts}, {"apt", "keys", keys}};
  const Cuda device(x);
  for (const Argument& argument : arguments) device.holds(argument);
  device.supports("apt", cuda::kAptLimits, size.D, size.P);
  const ActivationRows<Cuda> x_rows(arguments[0], false);
  const RowsOf prompts_rows(arguments[1]), keys_rows(arguments[2]);
  const AptForward args{
      .size = size,
      .activation = activation_named(activation),
      .x = x_rows.view(),
      .prompts = prompts_rows.view(),
      .keys = keys_rows.view(),
  };
  const Tensor begun = new_bytes(x, cuda::apt_forward_workspace(args));
  void* const weights = packed_weights(device, args, packed);
  device.check("apt", cuda::apt_begin(args, weights, begun.mutable_data_ptr(), device.queue()));
  return begun;
}
#endif

}  // namespace

#ifndef PETL_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(petl_ext, m) { m.def("apt_cuda_limits() -> (int, int, int)"); }

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CompositeExplicitAutograd, m) {
  m.impl("apt_cuda_limits", TORCH_BOX(&cuda_limits<cuda::kAptLimits>));
}

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CPU, m) {
  m.impl("apt_forward", TORCH_BOX(&apt_forward<Cpu>));
  m.impl("apt_backward", TORCH_BOX(&apt_backward<Cpu>));
}
#endif

#ifdef PETL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(PETL_CUDA_LIBRARY, PETL_CUDA_KEY, m) {
  m.impl("apt_pack", TORCH_BOX(&apt_pack));
  m.impl("apt_begin", TORCH_BOX(&apt_begin));
  m.impl("apt_forward", TORCH_BOX(&apt_forward<Cuda>));
  m.impl("apt_backward", TORCH_BOX(&apt_backward<Cuda>));
}
#endif

}  // namespace petl
