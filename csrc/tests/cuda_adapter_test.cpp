// The CUDA kernels of the adapter, on the emulator.
#include "adapter_problem.h"
#include "emulated.h"
#include "kernels/cuda/adapter.h"

namespace {

void forward(const petl::AdapterForward& args) {
  std::vector<double> packed = emulated::workspace(petl::cuda::adapter_packed_bytes(args));
  std::vector<double> workspace = emulated::workspace(petl::cuda::adapter_forward_workspace(args));
  emulated::expect_success(petl::cuda::adapter_forward(args, packed.data(), false, workspace.data(), emulated::kQueue));
}

void backward(const petl::AdapterBackward& args) {
  std::vector<double> workspace = emulated::workspace(petl::cuda::adapter_backward_workspace(args));
  emulated::expect_success(petl::cuda::adapter_backward(args, workspace.data(), emulated::kQueue));
}

}  // namespace

int main() {
  using adapter_problem::Residual;
  using petl::AdapterActivation;
  using petl::DType;
  const adapter_problem::Device device{"emulated", forward, backward};
  int checked = 0, failed = 0;
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    for (const bool norm : {false, true}) {
      // One size for every shape of the kernels, on and off the edges of its tiles.
      for (const auto& [R, D, B, activation, residual] :
           {std::tuple<int64_t, int64_t, int64_t, AdapterActivation, Residual>{1, 8, 1, AdapterActivation::silu,
                                                                               Residual::none},
            {65, 72, 50, AdapterActivation::relu, Residual::input},
            {67, 136, 96, AdapterActivation::gelu, Residual::other},
            {66, 72, 120, AdapterActivation::silu, Residual::other},
            {130, 64, 161, AdapterActivation::gelu, Residual::input},
            {129, 72, 200, AdapterActivation::relu, Residual::none},
            {33, 64, 300, AdapterActivation::silu, Residual::input},
            {65, 40, 510, AdapterActivation::relu, Residual::other},
            {70, 520, 20, AdapterActivation::gelu, Residual::input},
            // Few rows, as wide as two slices and more.
            {67, 264, 100, AdapterActivation::gelu, Residual::none},
            {33, 200, 200, AdapterActivation::silu, Residual::other},
            {5, 200, 510, AdapterActivation::relu, Residual::input},
            {2, 1672, 8, AdapterActivation::gelu, Residual::input},
            {600, 24, 9, AdapterActivation::relu, Residual::input}}) {
        // Tensor cores see the weights rounded, which flips ReLU's mask here and there, as in PyTorch.
        const AdapterActivation smooth = dtype == DType::float32 ? activation : AdapterActivation::silu;
        ++checked;
        failed += !check(device, adapter_problem::Problem(R, D, B, smooth, dtype, norm, residual));
      }
    }
  }
  // More rows than are few, in as many chunks.
  ++checked;
  failed += !check(
      device, adapter_problem::Problem(2056, 200, 9, AdapterActivation::silu, DType::bfloat16, true, Residual::input));
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
