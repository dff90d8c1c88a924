// The CUDA kernels of attention pooling, on the emulator.
#include <tuple>

#include "attention_pool_problem.h"
#include "emulated.h"
#include "emulator/settings.h"
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
  // What a block may ask for on the GPUs that have least, 8.6, 8.9 and 12.0.
  emulator::Settings settings = emulator::settings();
  settings.shared_memory_limit = 99 << 10;
  emulator::configure(settings);
  const attention_pool_problem::Device device{"emulated", forward, backward};
  int checked = 0, failed = 0;
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    for (const bool masked : {false, true}) {
      for (const auto& [B, N, D, H] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{1, 2, 8, 1},
                                       {2, 64, 72, 12},
                                       {1, 65, 136, 17},
                                       {2, 150, 264, 40},
                                       {1, 120, 136, 64},
                                       {1, 33, 1160, 5},
                                       {2, 81, 520, 16},
                                       {1, 197, 776, 12}}) {
        ++checked;
        failed += !check(device, attention_pool_problem::Problem(B, N, D, H, dtype, masked));
      }
    }
  }
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
