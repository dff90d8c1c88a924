// The Hopper path's skeleton with prompt diffusion's forward in it: whether out, gate and scores are right.
// python_tests/building/test_hopper_faults.py compiles it with one fault at a time planted into the kernels.
#include <algorithm>
#include <cmath>

#include "faults/hopper_modes.h"
#include "kernels/cuda/apt_hopper_forward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"

namespace {

using namespace hopper_faults;
constexpr int kP = kUnits;

struct Problem {
  Floats x = rounded(stored::random_floats(kR * kD, 1, 1), DType::bfloat16);
  Floats y = rounded(stored::random_floats(kR * kD, 1, 2), DType::bfloat16);
  Floats prompts = rounded(stored::random_floats(kP * kD, 0.1f, 3), DType::bfloat16);
  Floats keys = rounded(stored::random_floats(kP * kD, 0.1f, 4), DType::bfloat16);
  Doubles out = Doubles(kR * kD), gate = Doubles(kR), scores = Doubles(kR * kP);

  Problem() {
    for (int row = 0; row < kR; ++row) {
      double* const of_row = &scores[row * kP];
      for (int p = 0; p < kP; ++p) {
        for (int d = 0; d < kD; ++d) of_row[p] += double{x[row * kD + d]} * keys[p * kD + d];
        of_row[p] = std::max(of_row[p], 0.0);
        gate[row] = std::max(gate[row], of_row[p]);
      }
      for (int d = 0; d < kD; ++d) {
        double sum = 0;
        for (int p = 0; p < kP; ++p) sum += of_row[p] * prompts[p * kD + d];
        out[row * kD + d] = y[row * kD + d] + gate[row] * sum;
      }
    }
  }
};

struct Results {
  Stored out{Floats((kR + 1) * kD, kMargin), DType::bfloat16}, scores{Floats((kR + 1) * kP, kMargin), DType::bfloat16};
  Floats gate = Floats(kR + 1, kMargin);

  bool are_right(const Problem& problem) const {
    const Floats outs = out.values(), kept = scores.values();
    return close("out", outs, problem.out, 1e-2) && close("gate", gate, problem.gate, 1e-4) &&
           close("scores", kept, problem.scores, 1e-2) && has_margin(outs, kR * kD) && has_margin(kept, kR * kP) &&
           has_margin(gate, kR);
  }
};

template <int kCluster>
bool is_right(const Problem& problem) {
  const Stored x(problem.x, DType::bfloat16), y(problem.y, DType::bfloat16), keys(problem.keys, DType::bfloat16),
      prompts(problem.prompts, DType::bfloat16);
  const float log_scale = 0;
  Results results;
  std::vector<double> packed = emulated::workspace(2 * cuda::hopper_packed_elements(kD, kP, 1));
  cuda::HopperPacking<cuda::NoRows> packing = {};
  packing.first[0] = {cuda::weights_of(keys.rows(kD), kP, kD), cuda::Order::columns};
  packing.second = {cuda::weights_of(prompts.rows(kD), kP, kD), cuda::Order::depth};
  packing.firsts = 1;
  packing.D = kD;
  packing.inner = kInner;
  packing.target = packed.data();
  emulated::expect_success(cuda::launch_hopper_packing<Bfloat16>(emulated::kQueue, packing));
  using Op = cuda::AptHopperOp<Bfloat16, Activation::relu>;
  const Op op{&log_scale, DType::float32, results.gate.data(), static_cast<Bfloat16*>(results.scores.target().data), kP,
              kP};
  cuda::HopperTask<Op> task;
  const cuda::HopperOperands operands{kR,   kD, kP, {x.rows(kD)}, {y.rows(kD)}, results.out.target(), packed.data(),
                                      false};
  if (!cuda::set_hopper_task(task, op, operands)) return false;
  emulated::expect_success(cuda::launch_hopper_shape<Op, kInner, kCluster>(emulated::kQueue, task, kBlocks));
  return results.are_right(problem);
}

}  // namespace

int main() {
  const Problem problem;
  print_wrong_modes([&] { return is_right<1>(problem) && is_right<2>(problem); });
}
