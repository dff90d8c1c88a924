// The adapter by the Hopper path, on the emulator.
#include "adapter_problem.h"
#include "emulated.h"
#include "kernels/cuda/adapter.h"
#include "kernels/cuda/adapter_hopper.h"

namespace {

void forward(const petl::AdapterForward& args) {
  std::vector<double> packed = emulated::workspace(petl::cuda::adapter_hopper_packed_bytes(args));
  emulated::expect_success(petl::cuda::adapter_hopper_forward(args, packed.data(), false, emulated::kQueue));
}

void backward(const petl::AdapterBackward& args) {
  std::vector<double> workspace = emulated::workspace(petl::cuda::adapter_hopper_workspace(args));
  emulated::expect_success(petl::cuda::adapter_hopper_backward(args, workspace.data(), emulated::kQueue));
}

}  // namespace

// With `sound`, as the race search asks for it, which is slow, without the largest problems.
int main(int count, char**) {
  using adapter_problem::Residual;
  using petl::AdapterActivation;
  const adapter_problem::Device device{"emulated", forward, backward};
  int checked = 0, failed = 0;
  for (const bool norm : {false, true}) {
    // One size for every shape, on and off the edges of its tiles, and a row that a block of a cluster has for itself.
    for (const auto& [R, D, B, activation, residual] :
         {std::tuple<int64_t, int64_t, int64_t, AdapterActivation, Residual>{3, 64, 8, AdapterActivation::silu,
                                                                             Residual::none},
          {270, 320, 50, AdapterActivation::gelu, Residual::input},
          {64, 128, 64, AdapterActivation::silu, Residual::other},
          {65, 192, 96, AdapterActivation::gelu, Residual::other},
          {129, 320, 128, AdapterActivation::silu, Residual::input},
          {130, 256, 161, AdapterActivation::gelu, Residual::input},
          {131, 256, 200, AdapterActivation::silu, Residual::none},
          {67, 128, 209, AdapterActivation::gelu, Residual::input},
          {128, 320, 256, AdapterActivation::silu, Residual::other}}) {
      if (count > 1 && R * D > 34000) continue;
      ++checked;
      const adapter_problem::Problem problem(R, D, B, activation, petl::DType::bfloat16, norm, residual);
      failed += !check(device, problem);
    }
  }
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
