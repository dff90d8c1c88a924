#include "kernels/apt.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/check.h"
#include "ops/cpu.h"

namespace petl {
namespace {

Activation activation_named(const std::string& name) {
  STD_TORCH_CHECK(name == "relu" || name == "softmax", "apt: activation must be relu or softmax, got ", name);
  return name == "relu" ? Activation::relu : Activation::softmax;
}

AptSizes check_sizes(const Tensor& x, const Tensor& y, const Tensor& prompts, const Tensor& keys,
                     const Tensor& log_scale) {
  const Argument weights{"apt", "prompts", prompts};
  weights.is_matrix("[P, D]");
  const int64_t P = prompts.size(0), D = prompts.size(1);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == D, "apt: x must have shape [..., ", D,
                  "], as wide as prompts, got ", shape_text(shape_of(x)));
  Argument{"apt", "y", y}.has_shape(shape_of(x));
  Argument{"apt", "keys", keys}.has_shape({P, D});
  Argument{"apt", "log_scale", log_scale}.has_shape({1});
  return {x.numel() / D, D, P};
}

std::tuple<Tensor, Tensor, Tensor> apt_forward_cpu(const Tensor& x, const Tensor& y, const Tensor& prompts,
                                                   const Tensor& keys, const Tensor& log_scale, std::string activation,
                                                   bool keep_scores) {
  const AptSizes size = check_sizes(x, y, prompts, keys, log_scale);
  const Argument arguments[] = {{"apt", "x", x},
                                {"apt", "y", y},
                                {"apt", "prompts", prompts},
                                {"apt", "keys", keys},
                                {"apt", "log_scale", log_scale}};
  for (const Argument& argument : arguments) argument.is_on_cpu();
  const RowsOf rows[] = {RowsOf(arguments[0]), RowsOf(arguments[1]), RowsOf(arguments[2]), RowsOf(arguments[3]),
                         RowsOf(arguments[4])};
  Tensor out = torch::stable::new_empty(y, y.sizes());
  Tensor gate = new_floats(y, {size.R});
  Tensor scores = new_floats(y, keep_scores ? std::vector<int64_t>{size.R, size.P} : std::vector<int64_t>{0});
  cpu_kernels().apt_forward({size,
                             activation_named(activation),
                             rows[0].view(),
                             rows[1].view(),
                             rows[2].view(),
                             rows[3].view(),
                             rows[4].view(),
                             {out.mutable_data_ptr(), arguments[1].dtype()},
                             static_cast<float*>(gate.mutable_data_ptr()),
                             keep_scores ? static_cast<float*>(scores.mutable_data_ptr()) : nullptr},
                            &parallel_for);
  return {out, gate, scores};
}

// A weight's gradient is summed in float32 and takes the weight's dtype at the end.
Tensor in_dtype_of(const Tensor& gradient, const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Float ? gradient : torch::stable::to(gradient, weight.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> apt_backward_cpu(
    const Tensor& dout, const Tensor& x, std::optional<Tensor> y, const Tensor& prompts, const Tensor& keys,
    const Tensor& log_scale, const Tensor& gate, const Tensor& scores, std::string activation, bool needs_dx,
    bool needs_dy, bool needs_dprompts, bool needs_dkeys) {
  const AptSizes size = check_sizes(x, dout, prompts, keys, log_scale);
  const Argument kept[] = {{"apt", "gate", gate}, {"apt", "scores", scores}};
  kept[0].has_shape({size.R});
  kept[1].has_shape({size.R, size.P});
  for (const Argument& argument : kept) argument.is_plain_float32();
  const Argument arguments[] = {{"apt", "dout", dout},       {"apt", "x", x},       {"apt", "y", y ? *y : dout},
                                {"apt", "prompts", prompts}, {"apt", "keys", keys}, {"apt", "log_scale", log_scale}};
  for (const Argument& argument : arguments) argument.is_on_cpu();
  arguments[2].has_shape(shape_of(dout));
  STD_TORCH_CHECK(arguments[2].dtype() == arguments[0].dtype(), "apt: dout must have the dtype of y");
  const RowsOf rows[] = {RowsOf(arguments[0]), RowsOf(arguments[1]), RowsOf(arguments[2]),
                         RowsOf(arguments[3]), RowsOf(arguments[4]), RowsOf(arguments[5])};
  const auto empty_or = [](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  const auto floats_or_empty = [](bool needed, const Tensor& like) {
    return new_floats(like, needed ? shape_of(like) : std::vector<int64_t>{0});
  };
  Tensor dx = empty_or(needs_dx, x), dy = empty_or(needs_dy, dout);
  Tensor dprompts = floats_or_empty(needs_dprompts, prompts), dkeys = floats_or_empty(needs_dkeys, keys);
  Tensor dlog_scale = floats_or_empty(y.has_value(), log_scale);
  const auto floats = [](bool needed, const Tensor& t) {
    return needed ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
  };
  cpu_kernels().apt_backward({size,
                              activation_named(activation),
                              rows[0].view(),
                              rows[1].view(),
                              rows[2].view(),
                              rows[3].view(),
                              rows[4].view(),
                              rows[5].view(),
                              static_cast<const float*>(gate.const_data_ptr()),
                              static_cast<const float*>(scores.const_data_ptr()),
                              {needs_dx ? dx.mutable_data_ptr() : nullptr, arguments[1].dtype()},
                              {needs_dy ? dy.mutable_data_ptr() : nullptr, arguments[0].dtype()},
                              floats(needs_dprompts, dprompts),
                              floats(needs_dkeys, dkeys),
                              floats(y.has_value(), dlog_scale)},
                             &parallel_for);
  return {dx, dy, in_dtype_of(dprompts, prompts), in_dtype_of(dkeys, keys), in_dtype_of(dlog_scale, log_scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(petl_ext, CPU, m) {
  m.impl("apt_forward", TORCH_BOX(&apt_forward_cpu));
  m.impl("apt_backward", TORCH_BOX(&apt_backward_cpu));
}

}  // namespace petl
