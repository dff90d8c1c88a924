// The CPU kernels of prompt diffusion, on every path.
#include <thread>

#include "apt_problem.h"
#include "kernels/cpu/kernels.h"

namespace {

void two_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

}  // namespace

int main() {
  using petl::Activation;
  using petl::DType;
  int checked = 0, failed = 0;
  for (const std::string path : {"amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "portable"}) {
    if (!petl::cpu::choose_path(path.c_str())) continue;
    const petl::cpu::Kernels& kernels = *petl::cpu::kernels();
    const apt_problem::Device device{path,
                                     [&](const petl::AptForward& args) { kernels.apt_forward(args, two_threads); },
                                     [&](const petl::AptBackward& args) { kernels.apt_backward(args, two_threads); }};
    for (const Activation activation : {Activation::relu, Activation::softmax}) {
      for (const DType dtype : {DType::float32, DType::bfloat16}) {
        for (const auto& [R, D, P] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1},
                                      {5, 33, 3},
                                      {22, 70, 18},
                                      {97, 64, 16},
                                      {200, 100, 50},
                                      {2051, 40, 9}}) {
          ++checked;
          failed += !check(device, apt_problem::Problem(R, D, P, activation, dtype));
        }
      }
    }
  }
  std::printf("%s: %d checked, %d failed\n", petl::cpu::available_paths(), checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
