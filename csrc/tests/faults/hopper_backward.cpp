// As hopper.cpp, with prompt diffusion's backward: whether dx, dy, the left operands of the weights' gradients and the
// shares of dlog_scale are right.
#include <numeric>

#include "faults/hopper_modes.h"
#include "kernels/cuda/apt_hopper_backward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"

namespace {

using namespace hopper_faults;
constexpr int kP = kUnits;
constexpr float kLogScale = 0.25f;

struct Problem {
  Floats dout = rounded(stored::random_floats(kR * kD, 1, 1), DType::bfloat16);
  Floats y = rounded(stored::random_floats(kR * kD, 1, 2), DType::bfloat16);
  Floats prompts = rounded(stored::random_floats(kP * kD, 0.1f, 3), DType::bfloat16);
  Floats keys = rounded(stored::random_floats(kP * kD, 0.1f, 4), DType::bfloat16);
  Floats scores = rounded(stored::random_floats(kR * kP, 1, 5), DType::bfloat16);
  Floats gate = stored::random_floats(kR, 1, 6);
  Doubles dx = Doubles(kR * kD), dy = Doubles(kR * kD), dscores = Doubles(kR * kP), weighted = Doubles(kR * kP);
  double dlog_scale = 0;

  Problem() {
    for (float& score : scores) score = score < 0 ? 0 : score;
    for (int row = 0; row < kR; ++row) solve(row, std::exp(double{kLogScale}));
  }

 private:
  void solve(int row, double scale) {
    for (int d = 0; d < kD; ++d) {
      dy[row * kD + d] = scale * dout[row * kD + d];
      dlog_scale += dy[row * kD + d] * y[row * kD + d];
    }
    for (int p = 0; p < kP; ++p) {
      const int at = row * kP + p;
      for (int d = 0; d < kD; ++d) dscores[at] += double{dout[row * kD + d]} * prompts[p * kD + d];
      dscores[at] *= scores[at] > 0 ? scale * gate[row] : 0;
      weighted[at] = scale * gate[row] * scores[at];
      dlog_scale += scores[at] * dscores[at];
      for (int d = 0; d < kD; ++d) dx[row * kD + d] += dscores[at] * keys[p * kD + d];
    }
  }
};

struct Results {
  static Stored matrix(int columns) { return {Floats((kR + 1) * columns, kMargin), DType::bfloat16}; }

  Stored dx = matrix(kD), dy = matrix(kD), dscores = matrix(kP), weighted = matrix(kP);
  Doubles shares = Doubles(cuda::hopper_shares(kR) + 1, kMargin);

  bool are_right(const Problem& problem) const {
    const double dlog_scale = std::accumulate(shares.begin(), shares.end() - 1, 0.0);
    return is_right("dx", dx, problem.dx) && is_right("dy", dy, problem.dy) &&
           is_right("dscores", dscores, problem.dscores) && is_right("weighted", weighted, problem.weighted) &&
           close("dlog_scale", {static_cast<float>(dlog_scale)}, {problem.dlog_scale}, 1e-3) &&
           shares.back() == kMargin;
  }

 private:
  static bool is_right(const char* name, const Stored& found, const Doubles& wanted) {
    return close(name, found.values(), wanted, 1e-2) && has_margin(found.values(), wanted.size());
  }
};

template <int kCluster>
bool is_right(const Problem& problem) {
  const Stored dout(problem.dout, DType::bfloat16), y(problem.y, DType::bfloat16), keys(problem.keys, DType::bfloat16),
      prompts(problem.prompts, DType::bfloat16), scores(problem.scores, DType::bfloat16);
  Results results;
  std::vector<double> packed = emulated::workspace(2 * cuda::hopper_packed_elements(kD, kP, 1));
  cuda::HopperPacking<cuda::NoRows> packing = {};
  packing.first[0] = {cuda::weights_of(prompts.rows(kD), kP, kD), cuda::Order::columns};
  packing.second = {cuda::weights_of(keys.rows(kD), kP, kD), cuda::Order::depth};
  packing.firsts = 1;
  packing.D = kD;
  packing.inner = kInner;
  packing.target = packed.data();
  emulated::expect_success(cuda::launch_hopper_packing<Bfloat16>(emulated::kQueue, packing));
  using Op = cuda::AptHopperBackwardOp<Bfloat16, Activation::relu>;
  const auto target = [](Stored& stored) { return static_cast<Bfloat16*>(stored.target().data); };
  const auto source = [](const ConstRows& rows) { return static_cast<const Bfloat16*>(rows.data); };
  Op op;
  op.log_scale = &kLogScale;
  op.log_scale_dtype = DType::float32;
  op.y = source(y.rows(kD));
  op.y_stride = op.D = kD;
  op.dy = target(results.dy);
  op.gate = problem.gate.data();
  op.scores = source(scores.rows(kP));
  op.P = op.kept = kP;
  op.dscores = target(results.dscores);
  op.weighted = target(results.weighted);
  op.shares = results.shares.data();
  cuda::HopperTask<Op> task;
  const cuda::HopperOperands operands{kR, kD, kP, {dout.rows(kD)}, {}, results.dx.target(), packed.data(), false};
  if (!cuda::set_hopper_task(task, op, operands)) return false;
  emulated::expect_success(cuda::launch_hopper_shape<Op, kInner, kCluster>(emulated::kQueue, task, kBlocks));
  return results.are_right(problem);
}

}  // namespace

int main() {
  const Problem problem;
  print_wrong_modes([&] { return is_right<1>(problem) && is_right<2>(problem); });
}
