// The bottleneck adapter in plain loops in float64, and a device's kernels held against it, without torch. Buffers have
// exactly the size that the kernels may touch, so that the address sanitizer sees any step beyond.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/adapter.h"
#include "stored.h"

namespace adapter_problem {

using petl::AdapterActivation;
using petl::ConstRows;
using petl::DType;
using stored::close;
using stored::Doubles;
using stored::Floats;
using stored::random_floats;
using stored::rounded;
using stored::Stored;

enum class Residual { none, input, other };

// The normalized adapter has a gain, the other has none.
struct Problem {
  int64_t R, D, B;
  AdapterActivation activation;
  DType dtype;  // of x, residual and dout; the weights are float32
  bool norm;
  Residual residual_is;
  Floats x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, dout;

  static constexpr float kScale = 0.5f, kEpsilon = 1e-5f;

  Problem(int64_t R, int64_t D, int64_t B, AdapterActivation activation, DType dtype, bool norm, Residual residual_is)
      : R(R),
        D(D),
        B(B),
        activation(activation),
        dtype(dtype),
        norm(norm),
        residual_is(residual_is),
        x(rounded(random_floats(R * D, 1, 1), dtype)),
        residual(rounded(random_floats(R * D, 1, 2), dtype)),
        norm_weight(random_floats(D, 1, 3)),
        norm_bias(random_floats(D, 0.1f, 4)),
        down(random_floats(B * D, 0.1f, 5)),
        down_bias(random_floats(B, 0.1f, 6)),
        up(random_floats(D * B, 0.1f, 7)),
        up_bias(random_floats(D, 0.1f, 8)),
        gain{1.5f},
        dout(rounded(random_floats(R * D, 1, 9), dtype)) {}
};

struct Results {
  Doubles out, dx, dnorm_weight, dnorm_bias, ddown, ddown_bias, dup, dup_bias, dgain;
  double dgain_size;  // the root of the sum of its terms' squares: they may almost cancel, their errors do not
};

// {act(x), its derivative}
inline std::tuple<double, double> activated(AdapterActivation activation, double x) {
  if (activation == AdapterActivation::relu) return {x > 0 ? x : 0, x > 0 ? 1 : 0};
  if (activation == AdapterActivation::silu) {
    const double sigmoid = 1 / (1 + std::exp(-x));
    return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
  }
  const double below = 0.5 * std::erfc(-x / std::sqrt(2.0)), density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
  return {x * below, below + x * density};
}

inline Results expected(const Problem& p) {
  const int64_t R = p.R, D = p.D, B = p.B;
  Results r{Doubles(R * D), Doubles(R * D), Doubles(D), Doubles(D), Doubles(B * D),
            Doubles(B),     Doubles(D * B), Doubles(D), Doubles(1), 0};
  const double factor = p.norm ? double{Problem::kScale} * p.gain[0] : Problem::kScale;
  for (int64_t row = 0; row < R; ++row) {
    const float *x = &p.x[row * D], *dout = &p.dout[row * D];
    double mean = 0, variance = 0;
    for (int64_t d = 0; d < D; ++d) mean += x[d] / double(D);
    for (int64_t d = 0; d < D; ++d) variance += (x[d] - mean) * (x[d] - mean) / D;
    const double inverse = 1 / std::sqrt(variance + double{Problem::kEpsilon});
    Doubles normalized(D), input(D), dinput(D), added(D);
    for (int64_t d = 0; d < D; ++d) {
      normalized[d] = (x[d] - mean) * inverse;
      input[d] = p.norm ? normalized[d] * p.norm_weight[d] + p.norm_bias[d] : x[d];
      added[d] = p.up_bias[d];
    }
    for (int64_t b = 0; b < B; ++b) {
      double raw = p.down_bias[b], dhidden = 0;
      for (int64_t d = 0; d < D; ++d) raw += input[d] * p.down[b * D + d];
      const auto [hidden, slope] = activated(p.activation, raw);
      for (int64_t d = 0; d < D; ++d) {
        added[d] += hidden * p.up[d * B + b];
        dhidden += factor * dout[d] * p.up[d * B + b] * slope;
        r.dup[d * B + b] += factor * dout[d] * hidden;
      }
      r.ddown_bias[b] += dhidden;
      for (int64_t d = 0; d < D; ++d) {
        r.ddown[b * D + d] += dhidden * input[d];
        dinput[d] += dhidden * p.down[b * D + d];
      }
    }
    double sum = 0, product = 0;
    for (int64_t d = 0; d < D; ++d) {
      sum += dinput[d] * p.norm_weight[d] / D;
      product += dinput[d] * p.norm_weight[d] * normalized[d] / D;
      r.dnorm_weight[d] += dinput[d] * normalized[d];
      r.dnorm_bias[d] += dinput[d];
      r.dup_bias[d] += factor * dout[d];
      r.dgain[0] += Problem::kScale * dout[d] * added[d];
      r.dgain_size = std::hypot(r.dgain_size, Problem::kScale * dout[d] * added[d]);
      r.out[row * D + d] = factor * added[d];
      if (p.residual_is == Residual::input) r.out[row * D + d] += x[d];
      if (p.residual_is == Residual::other) r.out[row * D + d] += p.residual[row * D + d];
    }
    for (int64_t d = 0; d < D; ++d) {
      double dx = p.norm ? inverse * (dinput[d] * p.norm_weight[d] - sum - normalized[d] * product) : dinput[d];
      if (p.residual_is == Residual::input) dx += dout[d];
      r.dx[row * D + d] = dx;
    }
  }
  return r;
}

// The kernels of one device, to be run on memory of the host.
struct Device {
  std::string name;
  std::function<void(const petl::AdapterForward&)> forward;
  std::function<void(const petl::AdapterBackward&)> backward;
};

inline bool check(const Device& device, const Problem& p) {
  const int64_t R = p.R, D = p.D, B = p.B;
  const Stored x(p.x, p.dtype), residual(p.residual, p.dtype), dout(p.dout, p.dtype);
  const Stored norm_weight(p.norm_weight, DType::float32), norm_bias(p.norm_bias, DType::float32),
      down(p.down, DType::float32), down_bias(p.down_bias, DType::float32), up(p.up, DType::float32),
      up_bias(p.up_bias, DType::float32), gain(p.gain, DType::float32);
  Stored out(Floats(R * D), p.dtype), dx(Floats(R * D), p.dtype);
  const size_t norm_width = p.norm ? D : 0;
  Floats dnorm_weight(norm_width), dnorm_bias(norm_width), ddown(B * D), ddown_bias(B), dup(D * B), dup_bias(D);
  Floats dgain(p.norm ? 1 : 0);
  const ConstRows none{nullptr, 0, DType::float32};
  const petl::AdapterInputs inputs{{R, D, B},
                                   p.activation,
                                   x.rows(D),
                                   p.norm ? norm_weight.rows(D) : none,
                                   p.norm ? norm_bias.rows(D) : none,
                                   down.rows(D),
                                   down_bias.rows(B),
                                   up.rows(B),
                                   up_bias.rows(D),
                                   p.norm ? gain.rows(1) : none,
                                   Problem::kScale,
                                   Problem::kEpsilon};
  const ConstRows added = p.residual_is == Residual::none    ? none
                          : p.residual_is == Residual::input ? x.rows(D)
                                                             : residual.rows(D);
  device.forward({inputs, added, out.target()});
  device.backward({inputs, dout.rows(D), p.residual_is == Residual::input, dx.target(),
                   p.norm ? dnorm_weight.data() : nullptr, p.norm ? dnorm_bias.data() : nullptr, ddown.data(),
                   ddown_bias.data(), dup.data(), dup_bias.data(), p.norm ? dgain.data() : nullptr});
  const Results wanted = expected(p);
  const bool wide = p.dtype == DType::float32;
  // Sums of this length are good to a few units in the sixth digit in float32, in the third in bfloat16.
  const double tolerance = wide ? 1e-5 : 1e-2;
  const char* const activations[] = {"relu", "gelu", "silu"};
  const std::string where = device.name + " R=" + std::to_string(R) + " D=" + std::to_string(D) +
                            " B=" + std::to_string(B) + " " + activations[static_cast<int>(p.activation)] +
                            (p.norm ? " norm " : " ") + (wide ? "float32 " : "bfloat16 ");
  bool good = close(where + "out", out.values(), wanted.out, tolerance);
  good &= close(where + "dx", dx.values(), wanted.dx, tolerance);
  good &= close(where + "ddown", ddown, wanted.ddown, tolerance);
  good &= close(where + "ddown_bias", ddown_bias, wanted.ddown_bias, tolerance);
  good &= close(where + "dup", dup, wanted.dup, tolerance);
  good &= close(where + "dup_bias", dup_bias, wanted.dup_bias, tolerance);
  if (!p.norm) return good;
  good &= close(where + "dnorm_weight", dnorm_weight, wanted.dnorm_weight, tolerance);
  good &= close(where + "dnorm_bias", dnorm_bias, wanted.dnorm_bias, tolerance);
  const double size = wanted.dgain_size;
  good &= close(where + "dgain", {dgain[0], static_cast<float>(size)}, {wanted.dgain[0], size}, tolerance);
  return good;
}

}  // namespace adapter_problem
