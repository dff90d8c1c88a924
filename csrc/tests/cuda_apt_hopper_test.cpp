// Prompt diffusion by the Hopper path, on the emulator.
#include "apt_problem.h"
#include "emulated.h"
#include "kernels/cuda/apt.h"
#include "kernels/cuda/apt_hopper.h"
#include "kernels/cuda/hopper.h"

namespace {

void forward(const petl::AptForward& args) {
  std::vector<double> packed = emulated::workspace(petl::cuda::apt_hopper_packed_bytes(args));
  emulated::expect_success(petl::cuda::apt_hopper_forward(args, packed.data(), false, emulated::kQueue));
}

void backward(const petl::AptBackward& args) {
  std::vector<double> workspace = emulated::workspace(petl::cuda::apt_hopper_workspace(args));
  emulated::expect_success(petl::cuda::apt_hopper_backward(args, workspace.data(), emulated::kQueue));
}

}  // namespace

// With `sound`, as the race search asks for it, which is slow, without the largest problems.
int main(int count, char**) {
  using petl::Activation;
  const apt_problem::Device device{"emulated", forward, backward};
  int checked = 0, failed = 0;
  for (const Activation activation : {Activation::relu, Activation::softmax}) {
    // One size for every shape, on and off the edges of its tiles, and a row that a block of a cluster has for itself.
    for (const auto& [R, D, P] : {std::tuple<int64_t, int64_t, int64_t>{1, 64, 20},
                                  {64, 128, 64},
                                  {259, 320, 50},
                                  {65, 192, 90},
                                  {129, 320, 128},
                                  {130, 320, 161},
                                  {131, 320, 200},
                                  {140, 128, 208},
                                  {67, 128, 209},
                                  {128, 320, 256}}) {
      if (count > 1 && R * D > 42000) continue;
      ++checked;
      failed += !check(device, apt_problem::Problem(R, D, P, activation, petl::DType::bfloat16));
    }
  }
  // Why other GPUs and drivers cannot run it, in words.
  using namespace petl::cuda;
  for (const int error : {hopper_error_of(8, 0, true), hopper_error_of(9, 0, false), int{kHopperIsNotBuilt}}) {
    ++checked;
    failed += error == 0 || std::string(error_text(error)).find("PETL_HOPPER=1 must meet") != 0;
  }
  failed += hopper_error_of(9, 0, true) != 0;
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
