// The CUDA kernels of prompt diffusion, on the emulator.
#include "apt_problem.h"
#include "emulated.h"
#include "kernels/cuda/apt.h"

namespace {

void forward(const petl::AptForward& args) {
  std::vector<double> packed = emulated::workspace(petl::cuda::apt_packed_bytes(args));
  std::vector<double> workspace = emulated::workspace(petl::cuda::apt_forward_workspace(args));
  emulated::expect_success(
      petl::cuda::apt_forward(args, packed.data(), petl::cuda::AptDone::nothing, workspace.data(), emulated::kQueue));
}

void backward(const petl::AptBackward& args) {
  std::vector<double> workspace = emulated::workspace(petl::cuda::apt_backward_workspace(args));
  emulated::expect_success(petl::cuda::apt_backward(args, workspace.data(), emulated::kQueue));
}

}  // namespace

int main() {
  using petl::Activation;
  using petl::DType;
  const apt_problem::Device device{"emulated", forward, backward};
  int checked = 0, failed = 0;
  for (const Activation activation : {Activation::relu, Activation::softmax}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      // One size for every shape of the kernels, on and off the edges of its tiles.
      for (const auto& [R, D, P] : {std::tuple<int64_t, int64_t, int64_t>{1, 8, 1},
                                    {65, 72, 50},
                                    {64, 64, 64},
                                    {67, 136, 100},
                                    {70, 72, 90},
                                    {130, 64, 161},
                                    {129, 72, 200},
                                    {33, 64, 300},
                                    {65, 40, 510},
                                    {70, 520, 20},
                                    // Few rows, as wide as two slices and more.
                                    {67, 264, 100},
                                    {33, 200, 200},
                                    {18, 328, 300},
                                    {5, 320, 510},
                                    {2, 1672, 8},
                                    {600, 24, 9}}) {
        ++checked;
        failed += !check(device, apt_problem::Problem(R, D, P, activation, dtype));
      }
    }
  }
  // More rows than are few, in as many chunks.
  ++checked;
  failed += !check(device, apt_problem::Problem(2056, 200, 9, Activation::relu, DType::bfloat16));
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
