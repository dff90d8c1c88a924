// The CUDA kernels of attention pooling, on the emulator.
#include <tuple>

#include "attention_pool_problem.h"
#include "emulated.h"
#include "kernels/cuda/attention_pool.h"

namespace {

void forward(const petl::AttentionPoolForward& args) {
  std::vector<double> workspace = emulated::workspace(petl::cuda::attention_pool_forward_workspace(args));
  emulated::expect_success(petl::cuda::attention_pool_forward(args, workspace.data(), emulated::kQueue));
}

void backward(const petl::AttentionPoolBackward& args) {
  std::vector<double> workspace = emulated::workspace(petl::cuda::attention_pool_backward_workspace(args));
  emulated::expect_success(petl::cuda::attention_pool_backward(args, workspace.data(), emulated::kQueue));
}

}  // namespace

int main() {
  using petl::DType;
  const attention_pool_problem::Device device{"emulated", forward, backward};
  int checked = 0, failed = 0;
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    for (const bool masked : {false, true}) {
      for (const auto& [B, N, D, H] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{1, 2, 8, 1},
                                       {2, 64, 72, 12},
                                       {1, 65, 136, 17},
                                       {2, 150, 264, 40}}) {
        ++checked;
        failed += !check(device, attention_pool_problem::Problem(B, N, D, H, dtype, masked));
      }
    }
  }
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
