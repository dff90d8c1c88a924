// As hopper.cpp, with the adapter, normalized and with GELU: whether out, dx, and what backward leaves for the
// gradients of the weights are right.
#include <numeric>

#include "adapter_problem.h"
#include "faults/hopper_modes.h"
#include "kernels/cuda/adapter_hopper_backward.h"
#include "kernels/cuda/hopper_packing.h"
#include "kernels/cuda/launch_hopper.h"

namespace {

using namespace hopper_faults;
using adapter_problem::Residual;
using cuda::AdapterRows;
using cuda::HopperPacking;
using cuda::Order;
constexpr int kB = kUnits;
constexpr auto kGelu = AdapterActivation::gelu;

// The residual is x. A row's mean is not zero, and that of its first columns is another. Biases are large enough to
// show where they are missing.
struct Problem : adapter_problem::Problem {
  adapter_problem::Results wanted;

  Problem() : adapter_problem::Problem(kR, kD, kB, kGelu, DType::bfloat16, true, Residual::input) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += i % kD < 64 ? 5.0f : 3.0f;
    x = rounded(x, DType::bfloat16);
    for (float& bias : down_bias) bias *= 8;
    for (float& bias : up_bias) bias *= 16;
    wanted = expected(*this);
  }
};

struct Tensors {
  Stored x, dout, norm_weight, norm_bias, down, down_bias, up, up_bias, gain;
  AdapterInputs inputs;

  explicit Tensors(const Problem& p)
      : x(p.x, DType::bfloat16),
        dout(p.dout, DType::bfloat16),
        norm_weight(p.norm_weight, DType::float32),
        norm_bias(p.norm_bias, DType::float32),
        down(p.down, DType::float32),
        down_bias(p.down_bias, DType::float32),
        up(p.up, DType::float32),
        up_bias(p.up_bias, DType::float32),
        gain(p.gain, DType::float32),
        inputs{{kR, kD, kB},       kGelu,         x.rows(kD),         norm_weight.rows(kD),
               norm_bias.rows(kD), down.rows(kD), down_bias.rows(kB), up.rows(kB),
               up_bias.rows(kD),   gain.rows(1),  Problem::kScale,    Problem::kEpsilon} {}
};

// Room for packed weights, and the packing of what both directions have.
struct Packed {
  std::vector<double> weights, vectors;
  HopperPacking<AdapterRows> packing = {};

  Packed(const AdapterInputs& inputs, int firsts)
      : weights(emulated::workspace(2 * cuda::hopper_packed_elements(kD, kB, firsts))) {
    cuda::Partition counted(nullptr);
    cuda::AdapterVectors::in(counted, inputs.size);
    vectors = emulated::workspace(counted.bytes());
    cuda::Partition partition(vectors.data());
    packing.rows = cuda::adapter_rows(inputs, cuda::AdapterVectors::in(partition, inputs.size));
    packing.first[0] = {packing.rows.down, Order::columns, packing.rows.norm.weight};
    packing.firsts = firsts;
    packing.D = kD;
    packing.inner = kInner;
    packing.target = weights.data();
  }

  void run() const { emulated::expect_success(cuda::launch_hopper_packing<Bfloat16>(emulated::kQueue, packing)); }
};

template <class Op>
void set_inputs(Op& op, const AdapterInputs& inputs, const Packed& packed) {
  op.D = kD;
  op.B = kB;
  op.vectors = packed.packing.rows.vectors;
  op.scale = {inputs.scale, inputs.gain.data, inputs.gain.dtype};
  op.epsilon = inputs.epsilon;
}

template <int kCluster, class Op>
bool launch(const Op& op, const cuda::HopperOperands& operands) {
  cuda::HopperTask<Op> task;
  if (!cuda::set_hopper_task(task, op, operands)) return false;
  emulated::expect_success(cuda::launch_hopper_shape<Op, kInner, kCluster>(emulated::kQueue, task, kBlocks));
  return true;
}

template <int kCluster>
bool forward_is_right(const Problem& problem, const Tensors& tensors) {
  const AdapterInputs& inputs = tensors.inputs;
  Packed packed(inputs, 1);
  packed.packing.second = {cuda::weights_of(inputs.up, kD, kB), Order::columns};
  packed.run();
  cuda::AdapterHopperOp<Bfloat16, kGelu, true> op;
  set_inputs(op, inputs, packed);
  Stored out(Floats((kR + 1) * kD, kMargin), DType::bfloat16);
  return launch<kCluster>(op, {kR, kD, kB, {inputs.x}, {inputs.x}, out.target(), packed.weights.data(), false}) &&
         close("out", out.values(), problem.wanted.out, 1e-2) && has_margin(out.values(), kR * kD);
}

// What the weights' gradients are made of, and these in float64.
struct Gradients {
  Stored dx{Floats((kR + 1) * kD, kMargin), DType::bfloat16};
  Stored hidden{Floats((kR + 1) * kB, kMargin), DType::bfloat16}, dhidden = hidden;
  std::vector<cuda::RowStatistics> statistics{kR + 1, {kMargin, kMargin, kMargin}};
  Doubles shares = Doubles(cuda::hopper_shares(kR) + 1, kMargin);

  bool are_right(const Problem& problem) const {
    const float dgain = static_cast<float>(std::accumulate(shares.begin(), shares.end() - 1, 0.0));
    const adapter_problem::Results& wanted = problem.wanted;
    return close("dx", dx.values(), wanted.dx, 1e-2) && has_margin(dx.values(), kR * kD) &&
           std::abs(dgain - wanted.dgain[0]) <= 3e-3 * wanted.dgain_size && shares.back() == kMargin &&
           has_margin(hidden.values(), kR * kB) && has_margin(dhidden.values(), kR * kB) &&
           statistics.back().mean == kMargin && weights_are_right(problem);
  }

 private:
  // In every sixteenth column of D.
  bool weights_are_right(const Problem& problem) const {
    const Floats units = hidden.values(), dunits = dhidden.values();
    const float factor = Problem::kScale * problem.gain[0];
    bool good = true;
    for (int d = 0; d < kD; d += 16) {
      Floats ddown(kB), dup(kB);
      Doubles wanted_ddown(kB), wanted_dup(kB);
      for (int row = 0; row < kR; ++row) {
        const float normalized = statistics[row].normalized(problem.x[row * kD + d]);
        const float input = normalized * problem.norm_weight[d] + problem.norm_bias[d];
        for (int b = 0; b < kB; ++b) {
          ddown[b] += dunits[row * kB + b] * input;
          dup[b] += units[row * kB + b] * factor * problem.dout[row * kD + d];
        }
      }
      for (int b = 0; b < kB; ++b) {
        wanted_ddown[b] = problem.wanted.ddown[b * kD + d];
        wanted_dup[b] = problem.wanted.dup[d * kB + b];
      }
      good &= close("ddown", ddown, wanted_ddown, 1e-2) && close("dup", dup, wanted_dup, 1e-2);
    }
    return good;
  }
};

template <int kCluster>
bool backward_is_right(const Problem& problem, const Tensors& tensors) {
  const AdapterInputs& inputs = tensors.inputs;
  Packed packed(inputs, 2);
  packed.packing.first[1] = {cuda::weights_of(inputs.up, kD, kB), Order::depth};
  packed.packing.second = {packed.packing.rows.down, Order::depth};
  packed.run();
  Gradients gradients;
  std::vector<float4> products(kBlocks * cuda::kHopperRows * kInner / 4);
  cuda::AdapterHopperBackwardOp<Bfloat16, kGelu, true> op;
  set_inputs(op, inputs, packed);
  op.kept = kB;
  op.statistics = gradients.statistics.data();
  op.products = products.data();
  op.hidden = static_cast<Bfloat16*>(gradients.hidden.target().data);
  op.dhidden = static_cast<Bfloat16*>(gradients.dhidden.target().data);
  op.shares = gradients.shares.data();
  const ConstRows dout = tensors.dout.rows(kD);
  const cuda::HopperOperands operands{
      kR, kD, kB, {inputs.x, dout}, {inputs.x, dout}, gradients.dx.target(), packed.weights.data(), false};
  return launch<kCluster>(op, operands) && gradients.are_right(problem);
}

template <int kCluster>
bool is_right(const Problem& problem, const Tensors& tensors) {
  return forward_is_right<kCluster>(problem, tensors) && backward_is_right<kCluster>(problem, tensors);
}

}  // namespace

int main() {
  const Problem problem;
  const Tensors tensors(problem);
  print_wrong_modes([&] { return is_right<1>(problem, tensors) && is_right<2>(problem, tensors); });
}
