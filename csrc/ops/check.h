// What every op checks of its arguments, and how it says so: the op, the argument, what was expected, what came.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace petl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// An argument of an op under its names, for the messages.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  void has_shape(const std::vector<int64_t>& expected) const {
    STD_TORCH_CHECK(shape_of(tensor) == expected, op, ": ", name, " must have shape ", shape_text(expected), ", got ",
                    shape_text(shape_of(tensor)));
  }

  void is_matrix(const char* axes) const {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) > 0 && tensor.size(1) > 0, op, ": ", name, " must have shape ",
                    axes, " with no empty axis, got ", shape_text(shape_of(tensor)));
  }

  void is_on_cpu() const {
    STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU, as the other arguments are");
  }

  void is_plain_float32() const {
    is_on_cpu();
    STD_TORCH_CHECK(dtype() == DType::float32 && tensor.is_contiguous(), op, ": ", name,
                    " must be contiguous and float32, as the forward op returned it");
  }

  DType dtype() const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::float32;
      case ScalarType::BFloat16:
        return DType::bfloat16;
      case ScalarType::Half:
        return DType::float16;
      default:
        STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16, got ",
                        torch::headeronly::toString(tensor.scalar_type()));
    }
    return DType::float32;
  }
};

// A tensor as rows of its last axis, which is made contiguous where it is not; it keeps the copy alive.
class RowsOf {
 public:
  explicit RowsOf(const Argument& argument) : dtype_(argument.dtype()), tensor_(as_matrix(argument.tensor)) {}

  ConstRows view() const { return {tensor_.const_data_ptr(), tensor_.stride(0), dtype_}; }

 private:
  static Tensor as_matrix(const Tensor& tensor) {
    const int64_t width = tensor.dim() ? tensor.size(tensor.dim() - 1) : 1;
    Tensor matrix = torch::stable::reshape(tensor, {width ? tensor.numel() / width : 0, width});
    return matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
  }

  DType dtype_;
  Tensor tensor_;
};

inline Tensor new_floats(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

}  // namespace petl
