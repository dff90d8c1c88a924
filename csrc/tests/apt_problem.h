// Prompt diffusion in plain loops in float64, and a device's kernels held against it, without torch. Buffers have
// exactly the size that the kernels may touch, so that the address sanitizer sees any step beyond.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/apt.h"
#include "stored.h"

namespace apt_problem {

using petl::Activation;
using petl::ConstRows;
using petl::DType;
using stored::close;
using stored::Doubles;
using stored::Floats;
using stored::random_floats;
using stored::rounded;
using stored::Stored;

struct Problem {
  int64_t R, D, P;
  Activation activation;
  DType dtype;  // of x, y and dout; the weights are float32
  Floats x, y, prompts, keys, log_scale, dout;

  Problem(int64_t R, int64_t D, int64_t P, Activation activation, DType dtype)
      : R(R),
        D(D),
        P(P),
        activation(activation),
        dtype(dtype),
        x(rounded(random_floats(R * D, 1, 1), dtype)),
        y(rounded(random_floats(R * D, 1, 2), dtype)),
        prompts(random_floats(P * D, 0.1f, 3)),
        keys(random_floats(P * D, 0.1f, 4)),
        log_scale{0.2f},
        dout(rounded(random_floats(R * D, 1, 5), dtype)) {}
};

struct Results {
  Doubles out, dx, dy, dprompts, dkeys, dlog_scale;
};

inline Results expected(const Problem& problem) {
  const auto& [R, D, P, activation, dtype, x, y, prompts, keys, log_scale, dout] = problem;
  Results r{Doubles(R * D), Doubles(R * D), Doubles(R * D), Doubles(P * D), Doubles(P * D), Doubles(1)};
  const double scale = std::exp(double{log_scale[0]});
  for (int64_t row = 0; row < R; ++row) {
    Doubles scores(P), dscores(P);
    double best = -INFINITY, total = 0, mean = 0;
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t d = 0; d < D; ++d) scores[p] += double{x[row * D + d]} * keys[p * D + d];
      best = std::max(best, scores[p]);
    }
    for (double& score : scores) total += std::exp(score - best);
    for (double& score : scores) {
      score = activation == Activation::relu ? std::max(score, 0.0) : std::exp(score - best) / total;
    }
    const double gate = activation == Activation::relu ? std::max(best, 0.0) : 1 / total;
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t d = 0; d < D; ++d) dscores[p] += scale * gate * dout[row * D + d] * prompts[p * D + d];
      mean += scores[p] * dscores[p];
    }
    for (int64_t p = 0; p < P; ++p) {
      dscores[p] = activation == Activation::relu ? (scores[p] > 0 ? dscores[p] : 0) : scores[p] * (dscores[p] - mean);
    }
    for (int64_t d = 0; d < D; ++d) {
      const double g = dout[row * D + d];
      double sum = 0;
      for (int64_t p = 0; p < P; ++p) {
        sum += scores[p] * prompts[p * D + d];
        r.dx[row * D + d] += dscores[p] * keys[p * D + d];
        r.dprompts[p * D + d] += scale * gate * scores[p] * g;
        r.dkeys[p * D + d] += dscores[p] * x[row * D + d];
      }
      r.out[row * D + d] = scale * (y[row * D + d] + gate * sum);
      r.dy[row * D + d] = scale * g;
      r.dlog_scale[0] += g * r.out[row * D + d];
    }
  }
  return r;
}

// The kernels of one device, to be run on memory of the host.
struct Device {
  std::string name;
  std::function<void(const petl::AptForward&)> forward;
  std::function<void(const petl::AptBackward&)> backward;
};

inline bool check(const Device& device, const Problem& problem) {
  const auto& [R, D, P, activation, dtype, x, y, prompts, keys, log_scale, dout] = problem;
  const Stored stored_x(x, dtype), stored_y(y, dtype), stored_dout(dout, dtype);
  const Stored weights[] = {{prompts, DType::float32}, {keys, DType::float32}, {log_scale, DType::float32}};
  Stored out(Floats(R * D), dtype), dx(Floats(R * D), dtype), dy(Floats(R * D), dtype);
  Stored scores(Floats(R * ((P + 7) / 8 * 8)), dtype);
  Floats gate(R), dprompts(P * D), dkeys(P * D), dlog_scale(1);
  device.forward({{R, D, P},
                  activation,
                  stored_x.rows(D),
                  stored_y.rows(D),
                  weights[0].rows(D),
                  weights[1].rows(D),
                  weights[2].rows(1),
                  out.target(),
                  gate.data(),
                  scores.target()});
  device.backward({{R, D, P},
                   activation,
                   stored_dout.rows(D),
                   stored_x.rows(D),
                   stored_y.rows(D),
                   weights[0].rows(D),
                   weights[1].rows(D),
                   weights[2].rows(1),
                   gate.data(),
                   scores.rows((P + 7) / 8 * 8),
                   dx.target(),
                   dy.target(),
                   dprompts.data(),
                   dkeys.data(),
                   dlog_scale.data()});
  const Results wanted = expected(problem);
  const bool wide = dtype == DType::float32;
  // Sums of this length are good to a few units in the sixth digit in float32, in the third in bfloat16.
  const double tolerance = wide ? 1e-5 : 1e-2;
  const std::string where = device.name + " R=" + std::to_string(R) + " D=" + std::to_string(D) +
                            " P=" + std::to_string(P) + (activation == Activation::relu ? " relu " : " softmax ") +
                            (wide ? "float32 " : "bfloat16 ");
  bool good = close(where + "out", out.values(), wanted.out, tolerance);
  good &= close(where + "dx", dx.values(), wanted.dx, tolerance);
  good &= close(where + "dy", dy.values(), wanted.dy, tolerance);
  good &= close(where + "dprompts", dprompts, wanted.dprompts, tolerance);
  good &= close(where + "dkeys", dkeys, wanted.dkeys, tolerance);
  good &= close(where + "dlog_scale", dlog_scale, wanted.dlog_scale, tolerance);
  return good;
}

}  // namespace apt_problem
