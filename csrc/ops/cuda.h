// How an op reaches the CUDA kernels: the tensors' device, torch's current stream, and errors in words.
//
// No CUDA header is needed here. In an emulated build (PETL_EMULATED) the same ops run the same kernels on the host,
// for CPU tensors, in a library of their own.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels/cuda/kernels.h"
#include "ops/check.h"

#ifdef PETL_EMULATED
#define PETL_CUDA_LIBRARY petl_emulated
#define PETL_CUDA_KEY CPU
#else
#define PETL_CUDA_LIBRARY petl_ext
#define PETL_CUDA_KEY CUDA
// libtorch_cuda has it; weak, so that the same file also loads under a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace petl {

// The device of a call: the current one, as long as this lives.
class Cuda {
 public:
  static constexpr int64_t kRowAlignment = 16;
  static constexpr bool kMixesDtypes = false;

#ifdef PETL_EMULATED
  explicit Cuda(const Tensor&) : queue_{0, nullptr} {}
  bool is_here(const Tensor& tensor) const { return tensor.is_cpu(); }
#else
  explicit Cuda(const Tensor& like) : guard_(index_of(like)), queue_{index_of(like), nullptr} {
    PETL_REQUIRE(aoti_torch_get_current_cuda_stream, "petl_ext: this torch has no CUDA support");
    PETL_REQUIRE(aoti_torch_get_current_cuda_stream(queue_.device, &queue_.stream) == 0,
                 "petl_ext: torch gave no current stream for cuda:", queue_.device);
  }
  bool is_here(const Tensor& tensor) const { return tensor.is_cuda() && tensor.get_device_index() == queue_.device; }
#endif

  const cuda::Queue& queue() const { return queue_; }

  void holds(const Argument& argument) const {
    PETL_REQUIRE(is_here(argument.tensor), argument.op, ": ", argument.name, " must be on cuda:", queue_.device,
                 ", as x is");
  }

  // The width and the inner size.
  void supports(const char* op, const cuda::Limits& limits, int64_t D, int64_t inner) const {
    PETL_REQUIRE(D % cuda::kVectorWidth == 0 && D <= cuda::kMaxWidth, op,
                 ": on CUDA the width D must be a multiple of ", cuda::kVectorWidth, " up to ", cuda::kMaxWidth,
                 ", got ", D);
    PETL_REQUIRE(inner <= limits.max_inner, op, ": on CUDA ", limits.inner, " must be at most ", limits.max_inner,
                 ", got ", inner);
  }

  void check(const char* op, int error) const {
    PETL_REQUIRE(error == 0, op,
                 ": the CUDA kernel could not be launched, or one before it failed: ", cuda::error_text(error));
  }

 private:
#ifndef PETL_EMULATED
  static int index_of(const Tensor& x) {
    PETL_REQUIRE(x.is_cuda(), "petl_ext: x must be on CUDA, as other arguments are");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cuda::Queue queue_;
};

// The memory of an argument of bytes that the raw op of `maker`, as in "_pack", returned.
inline void* bytes_of(const Argument& argument, int64_t count, const char* maker) {
  const Tensor& bytes = argument.tensor;
  PETL_REQUIRE(bytes.scalar_type() == ScalarType::Byte && bytes.is_contiguous() && bytes.numel() == count, argument.op,
               ": ", argument.name, " must be contiguous, uint8 and have ", count, " elements, as ", argument.op, maker,
               " returned it, got ", bytes.numel());
  return bytes.mutable_data_ptr();
}

// The weights that a forward finds packed, or room to pack them, and its workspace.
class ForwardMemory {
 public:
  ForwardMemory(const char* op, const std::optional<Tensor>& packed, int64_t packed_bytes, int64_t workspace_bytes,
                const Tensor& like) {
    if (packed) {
      packed_ = bytes_of({op, "packed", *packed}, packed_bytes, "_pack");
      if (workspace_bytes == 0) return;
    }
    const int64_t own_packed = packed ? 0 : packed_bytes;
    own_.emplace(new_bytes(like, own_packed + workspace_bytes));
    char* const begin = static_cast<char*>(own_->mutable_data_ptr());
    if (!packed) packed_ = begin;
    workspace_ = begin + own_packed;
  }

  void* packed() const { return packed_; }
  void* workspace() const { return workspace_; }

 private:
  std::optional<Tensor> own_;
  void* packed_ = nullptr;
  void* workspace_ = nullptr;
};

}  // namespace petl
