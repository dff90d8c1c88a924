// Attention pooling in plain loops in float64, and a device's kernels held against it, without torch. Buffers have
// exactly the size that the kernels may touch, so that the address sanitizer sees any step beyond.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention_pool.h"
#include "stored.h"

namespace attention_pool_problem {

using petl::DType;
using stored::close;
using stored::Doubles;
using stored::Floats;
using stored::random_floats;
using stored::rounded;
using stored::Stored;

struct Problem {
  int64_t B, N, D, H;
  DType dtype;  // of visual, pooled and dpooled; the query is float32
  bool masked;
  Floats visual, query, dpooled;
  std::vector<uint8_t> mask;

  static constexpr float kScale = 0.125f;

  Problem(int64_t B, int64_t N, int64_t D, int64_t H, DType dtype, bool masked)
      : B(B),
        N(N),
        D(D),
        H(H),
        dtype(dtype),
        masked(masked),
        visual(rounded(random_floats(B * N * D, 1, 1), dtype)),
        query(random_floats(B * H * D, 1, 2)),
        dpooled(rounded(random_floats(B * H * D, 1, 3), dtype)),
        mask(masked ? B * N : 0) {
    std::mt19937 engine(4);
    for (uint8_t& takes_part : mask) takes_part = engine() % 2;
    for (int64_t b = 0; masked && b < B; ++b) mask[b * N + N - 1] = 1;
  }

  bool takes_part(int64_t b, int64_t n) const { return !masked || mask[b * N + n]; }
};

struct Results {
  Doubles pooled, dvisual, dquery;
};

inline Results expected(const Problem& p) {
  const int64_t N = p.N, D = p.D;
  Results r{Doubles(p.B * p.H * D), Doubles(p.B * N * D), Doubles(p.B * p.H * D)};
  for (int64_t row = 0; row < p.B * p.H; ++row) {
    const int64_t b = row / p.H;
    const float *query = &p.query[row * D], *dpooled = &p.dpooled[row * D], *visual = &p.visual[b * N * D];
    Doubles scores(N, -INFINITY), dweights(N);
    for (int64_t n = 0; n < N; ++n) {
      if (!p.takes_part(b, n)) continue;
      scores[n] = 0;
      for (int64_t d = 0; d < D; ++d) {
        scores[n] += double{Problem::kScale} * visual[n * D + d] * query[d];
        dweights[n] += double{visual[n * D + d]} * dpooled[d];
      }
    }
    const double best = *std::max_element(scores.begin(), scores.end());
    double total = 0, mean = 0;
    for (double score : scores) total += std::exp(score - best);
    for (int64_t n = 0; n < N; ++n) mean += std::exp(scores[n] - best) / total * dweights[n];
    for (int64_t n = 0; n < N; ++n) {
      const double weight = std::exp(scores[n] - best) / total,
                   dscore = Problem::kScale * weight * (dweights[n] - mean);
      for (int64_t d = 0; d < D; ++d) {
        r.pooled[row * D + d] += weight * visual[n * D + d];
        r.dquery[row * D + d] += dscore * visual[n * D + d];
        r.dvisual[(b * N + n) * D + d] += dscore * query[d] + weight * dpooled[d];
      }
    }
  }
  return r;
}

// The kernels of one device, to be run on memory of the host.
struct Device {
  std::string name;
  std::function<void(const petl::AttentionPoolForward&)> forward;
  std::function<void(const petl::AttentionPoolBackward&)> backward;
};

inline bool check(const Device& device, const Problem& p) {
  const int64_t rows = p.B * p.H, D = p.D;
  const Stored visual(p.visual, p.dtype), query(p.query, DType::float32), dpooled(p.dpooled, p.dtype);
  Stored pooled(Floats(rows * D), p.dtype), dvisual(Floats(p.visual.size()), p.dtype);
  Floats statistics(2 * rows), dquery(rows * D);
  const petl::AttentionPoolInputs inputs{
      {p.B, p.N, D, p.H}, visual.rows(D), p.N * D, query.rows(D), p.masked ? p.mask.data() : nullptr, Problem::kScale};
  device.forward({inputs, pooled.target(), statistics.data()});
  device.backward({inputs, dpooled.rows(D), pooled.rows(D), statistics.data(), dvisual.target(), dquery.data()});
  const Results wanted = expected(p);
  const bool wide = p.dtype == DType::float32;
  const double tolerance = wide ? 1e-5 : 1e-2;
  const std::string where = device.name + " B=" + std::to_string(p.B) + " N=" + std::to_string(p.N) +
                            " D=" + std::to_string(D) + " H=" + std::to_string(p.H) + (p.masked ? " masked " : " ") +
                            (wide ? "float32 " : "bfloat16 ");
  bool good = close(where + "pooled", pooled.values(), wanted.pooled, tolerance);
  good &= close(where + "dvisual", dvisual.values(), wanted.dvisual, tolerance);
  good &= close(where + "dquery", dquery, wanted.dquery, tolerance);
  // Each gradient alone, the other nowhere.
  Stored dvisual_alone(Floats(p.visual.size()), p.dtype);
  Floats dquery_alone(rows * D);
  device.backward({inputs, dpooled.rows(D), pooled.rows(D), statistics.data(), dvisual_alone.target(), nullptr});
  device.backward(
      {inputs, dpooled.rows(D), pooled.rows(D), statistics.data(), {nullptr, p.dtype}, dquery_alone.data()});
  const bool same = dvisual_alone.values() == dvisual.values() && dquery_alone == dquery;
  if (!same) std::printf("%s: a gradient alone differs\n", where.c_str());
  return good && same;
}

}  // namespace attention_pool_problem
