// The Hopper path's skeleton with prompt diffusion in it, alone and in clusters of two, in every mode of the emulator:
// whether out, gate and scores are right. python_tests/building/test_hopper_faults.py compiles it with one fault at a
// time planted into the kernels.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "emulated.h"
#include "emulator/settings.h"
#include "kernels/cuda/apt_hopper_forward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"
#include "stored.h"

namespace {

using namespace petl;
using cuda::Bfloat16;
using stored::close;
using stored::Doubles;
using stored::Floats;
using stored::rounded;
using stored::Stored;

// Three tiles of rows for two blocks, the last one ragged; as many chunks as go round the ring twice; inner columns
// whose last piece is the narrowest.
constexpr int kR = 300, kD = 384, kP = 200, kInner = 208, kBlocks = 2;

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

// With a row of a margin behind each result, which must stay as it is.
struct Results {
  Stored out{Floats((kR + 1) * kD, -7), DType::bfloat16}, scores{Floats((kR + 1) * kP, -7), DType::bfloat16};
  Floats gate = Floats(kR + 1, -7);

  bool are_right(const Problem& problem) const {
    const Floats outs = out.values(), kept = scores.values();
    bool good = close("out", outs, problem.out, 1e-2) && close("gate", gate, problem.gate, 1e-4) &&
                close("scores", kept, problem.scores, 1e-2);
    for (int d = 0; d < kD; ++d) good &= outs[kR * kD + d] == -7;
    for (int p = 0; p < kP; ++p) good &= kept[kR * kP + p] == -7;
    return good && gate[kR] == -7;
  }
};

template <int kCluster>
bool is_right(const Problem& problem) {
  const Stored x(problem.x, DType::bfloat16), y(problem.y, DType::bfloat16), keys(problem.keys, DType::bfloat16),
      prompts(problem.prompts, DType::bfloat16);
  const float log_scale = 0;
  Results results;
  std::vector<double> packed = emulated::workspace(2 * cuda::hopper_packed_elements(kD, kP, false));
  cuda::HopperPacking<cuda::NoRows> packing = {};
  packing.first = cuda::weights_of(keys.rows(kD), kP, kD);
  packing.second = cuda::weights_of(prompts.rows(kD), kP, kD);
  packing.second_order = cuda::Order::depth;
  packing.D = kD;
  packing.inner = kInner;
  packing.target = packed.data();
  emulated::expect_success(cuda::launch_hopper_packing<Bfloat16>(emulated::kQueue, packing));
  using Op = cuda::AptHopperOp<Bfloat16, Activation::relu>;
  const Op op{&log_scale, DType::float32, results.gate.data(), static_cast<Bfloat16*>(results.scores.target().data), kP,
              kP};
  cuda::HopperTask<Op> task;
  const cuda::HopperOperands operands{kR, kD, kP, x.rows(kD), y.rows(kD), results.out.target(), packed.data(), false};
  if (!cuda::set_hopper_task(task, op, operands)) return false;
  emulated::expect_success(cuda::launch_hopper_shape<Op, kInner, kCluster>(emulated::kQueue, task, kBlocks));
  return results.are_right(problem);
}

bool is_right_in_this_mode(const Problem& problem) {
  try {
    return is_right<1>(problem) && is_right<2>(problem);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return false;
  }
}

}  // namespace

// Prints the modes in which something is wrong.
int main() {
  using namespace emulator;
  const Problem problem;
  for (const Order order : {Order::forward, Order::reverse}) {
    for (const Copies copies : {Copies::lazy, Copies::eager}) {
      Settings settings;
      settings.order = order;
      settings.copies = copies;
      settings.threads = 1;
      configure(settings);
      if (!is_right_in_this_mode(problem)) std::printf("wrong in %s, %s\n", name_of(order), name_of(copies));
    }
  }
}
