// What every op checks of its arguments, and how it says so: "op: argument must be ..., got ...".
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/tensor.h"
#include "ops/require.h"

namespace petl {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(IntHeaderOnlyArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// An argument of an op under its names, for the messages.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  void has_shape(IntHeaderOnlyArrayRef expected) const {
    PETL_REQUIRE(tensor.sizes() == expected, op, ": ", name, " must have shape ", shape_text(expected), ", got ",
                 shape_text(tensor.sizes()));
  }

  void is_matrix(const char* axes) const {
    PETL_REQUIRE(tensor.dim() == 2 && tensor.size(0) > 0 && tensor.size(1) > 0, op, ": ", name, " must have shape ",
                 axes, " with no empty axis, got ", shape_text(tensor.sizes()));
  }

  void is_as_forward_returned(ScalarType expected) const {
    PETL_REQUIRE(tensor.scalar_type() == expected && tensor.is_contiguous(), op, ": ", name, " must be contiguous and ",
                 torch::headeronly::toString(expected), ", as the forward op returned it");
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
        PETL_REQUIRE(false, op, ": ", name, " must be float32, bfloat16 or float16, got ",
                     torch::headeronly::toString(tensor.scalar_type()));
    }
    return DType::float32;
  }
};

// A tensor as rows of its last axis. Where they are not contiguous, or do not begin at multiples of `alignment` bytes,
// it is copied; the copy lives as long as this.
class RowsOf {
 public:
  explicit RowsOf(const Argument& argument, int64_t alignment = 1)
      : dtype_(argument.dtype()), tensor_(argument.tensor), stride_(width()) {
    if (tensor_.is_contiguous() && is_aligned(tensor_, stride_, alignment)) return;  // most are, and no view is made
    tensor_ = as_matrix(tensor_, alignment);
    stride_ = tensor_.stride(0);
  }

  ConstRows view() const { return {tensor_.const_data_ptr(), stride_, dtype_}; }

 private:
  int64_t width() const { return tensor_.dim() ? tensor_.size(tensor_.dim() - 1) : 1; }

  static bool is_aligned(const Tensor& tensor, int64_t stride, int64_t alignment) {
    const int64_t begin = reinterpret_cast<int64_t>(tensor.const_data_ptr());
    return begin % alignment == 0 && stride * tensor.element_size() % alignment == 0;
  }

  Tensor as_matrix(const Tensor& tensor, int64_t alignment) const {
    const int64_t width = stride_;
    Tensor matrix = torch::stable::reshape(tensor, {width ? tensor.numel() / width : 0, width});
    if (matrix.stride(1) != 1) return torch::stable::contiguous(matrix);
    if (is_aligned(matrix, matrix.stride(0), alignment)) return matrix;
    // Not clone(), which keeps the strides of a tensor whose rows overlap.
    Tensor copy = torch::stable::new_empty(matrix, matrix.sizes());
    return torch::stable::copy_(copy, matrix);
  }

  DType dtype_;
  Tensor tensor_;
  int64_t stride_;  // the width, until a matrix says another
};

inline constexpr int64_t kNotNeeded[] = {0};  // the shape of a result that is not needed

// Contiguous, on the device of `like`. The shim's own function, since the boxed call of new_empty takes a microsecond.
inline Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i] > 0 ? shape[i] : 1) strides[i] = stride;
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  static_cast<int32_t>(dtype), type, index, &made));
  return Tensor(made);
}

inline Tensor new_floats(const Tensor& like, IntHeaderOnlyArrayRef shape) {
  return new_tensor(like, shape, ScalarType::Float);
}

inline Tensor new_bytes(const Tensor& like, int64_t count) { return new_tensor(like, {count}, ScalarType::Byte); }

inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class Device>
void may_round_x(const char* op, bool rounds_x) {
  PETL_REQUIRE(!rounds_x || Device::kMixesDtypes, op, ": rounds_x must be False on a GPU, got True");
}

// The rows of an activation as a device's kernels want them; `widen` asks for a copy in float32.
template <class Device>
class ActivationRows {
 public:
  ActivationRows(const Argument& argument, bool widen)
      : wide_(widen ? in_dtype(argument.tensor, ScalarType::Float) : argument.tensor),
        rows_({argument.op, argument.name, wide_}, Device::kRowAlignment) {}

  ConstRows view() const { return rows_.view(); }

 private:
  Tensor wide_;
  RowsOf rows_;
};

// A result shaped as an argument and in its dtype, computed in float32 where `widen` says so; empty if not needed.
class Result {
 public:
  Result(const Tensor& like, bool widen, bool needed = true) : Result(like, like.scalar_type(), widen, needed) {}

  // In another dtype.
  Result(const Tensor& like, ScalarType dtype, bool widen, bool needed)
      : dtype_(dtype),
        needed_(needed),
        tensor_(new_tensor(like, needed ? like.sizes() : IntHeaderOnlyArrayRef(kNotNeeded),
                           widen ? ScalarType::Float : dtype_)) {}

  Rows rows() const {
    return {needed_ ? tensor_.mutable_data_ptr() : nullptr, Argument{"result", "result", tensor_}.dtype()};
  }
  Tensor tensor() const { return in_dtype(tensor_, dtype_); }

 private:
  ScalarType dtype_;
  bool needed_;
  Tensor tensor_;
};

// The gradient of a weight: summed in float32, it takes the weight's dtype at the end; empty if not needed.
class WeightGradient {
 public:
  WeightGradient(const Tensor& weight, bool needed)
      : dtype_(weight.scalar_type()),
        needed_(needed),
        sums_(new_floats(weight, needed ? weight.sizes() : IntHeaderOnlyArrayRef(kNotNeeded))) {}

  float* data() const { return needed_ ? static_cast<float*>(sums_.mutable_data_ptr()) : nullptr; }
  Tensor tensor() const { return in_dtype(sums_, dtype_); }

 private:
  ScalarType dtype_;
  bool needed_;
  Tensor sums_;
};

}  // namespace petl
