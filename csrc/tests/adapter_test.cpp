// The CPU kernels of the adapter, on every path.
#include <thread>

#include "adapter_problem.h"
#include "kernels/cpu/kernels.h"

namespace {

void two_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

// A path, of which backward takes what forward keeps.
adapter_problem::Device keeping(const std::string& path, const petl::cpu::Kernels& kernels, std::vector<char>& memory) {
  const auto dtype_of = [](const petl::AdapterInputs& inputs) {
    return inputs.x.dtype == petl::DType::bfloat16 ? petl::DType::bfloat16 : petl::DType::float32;
  };
  const auto forward = [&, dtype_of](petl::AdapterForward args) {
    const petl::DType dtype = dtype_of(args.inputs);
    memory = std::vector<char>(args.inputs.size.R * args.inputs.size.B * (dtype == petl::DType::float32 ? 4 : 2));
    args.raw = {memory.data(), dtype};
    kernels.adapter_forward(args, two_threads);
  };
  const auto backward = [&, dtype_of](petl::AdapterBackward args) {
    args.raw = {memory.data(), args.inputs.size.B, dtype_of(args.inputs)};
    kernels.adapter_backward(args, two_threads);
  };
  return {path + " keeping", forward, backward};
}

}  // namespace

int main() {
  using adapter_problem::Residual;
  using petl::AdapterActivation;
  using petl::DType;
  int checked = 0, failed = 0;
  std::vector<char> kept;
  for (const std::string path : {"amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "portable"}) {
    if (!petl::cpu::choose_path(path.c_str())) continue;
    const petl::cpu::Kernels& kernels = *petl::cpu::kernels();
    const adapter_problem::Device device{
        path, [&](const petl::AdapterForward& args) { kernels.adapter_forward(args, two_threads); },
        [&](const petl::AdapterBackward& args) { kernels.adapter_backward(args, two_threads); }};
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const bool norm : {false, true}) {
        for (const auto& [R, D, B, activation, residual] :
             {std::tuple<int64_t, int64_t, int64_t, AdapterActivation, Residual>{1, 8, 1, AdapterActivation::silu,
                                                                                 Residual::none},
              {5, 33, 3, AdapterActivation::relu, Residual::input},
              {97, 64, 16, AdapterActivation::gelu, Residual::other},
              {200, 100, 50, AdapterActivation::relu, Residual::none},
              {200, 66, 35, AdapterActivation::silu, Residual::input},
              {2051, 40, 9, AdapterActivation::relu, Residual::input}}) {
          const adapter_problem::Problem problem(R, D, B, activation, dtype, norm, residual);
          checked += 2;
          failed += !check(device, problem);
          failed += !check(keeping(path, kernels, kept), problem);
        }
      }
    }
  }
  std::printf("%s: %d checked, %d failed\n", petl::cpu::available_paths(), checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
