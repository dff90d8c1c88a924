// The CPU kernels of attention pooling, on every path.
#include <thread>
#include <tuple>

#include "attention_pool_problem.h"
#include "kernels/cpu/kernels.h"

namespace {

void two_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

}  // namespace

int main() {
  using petl::DType;
  int checked = 0, failed = 0;
  for (const std::string path : {"amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "portable"}) {
    if (!petl::cpu::choose_path(path.c_str())) continue;
    const petl::cpu::Kernels& kernels = *petl::cpu::kernels();
    const attention_pool_problem::Device device{
        path, [&](const petl::AttentionPoolForward& args) { kernels.attention_pool_forward(args, two_threads); },
        [&](const petl::AttentionPoolBackward& args) { kernels.attention_pool_backward(args, two_threads); }};
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const bool masked : {false, true}) {
        for (const auto& [B, N, D, H] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{1, 2, 1, 1},
                                         {2, 7, 33, 3},
                                         {3, 64, 64, 12},
                                         {1, 129, 100, 16},
                                         {2, 300, 66, 7}}) {
          ++checked;
          failed += !check(device, attention_pool_problem::Problem(B, N, D, H, dtype, masked));
        }
      }
    }
  }
  std::printf("%s: %d checked, %d failed\n", petl::cpu::available_paths(), checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
