// Sums of rounded factors, where their sign matters.
// A part of path.inl.

// Rounded weights change the sign of sums near zero, and with it ReLU's mask: the input gradient becomes 24 times less
// accurate than its own rounding. So sums that rounding may have carried across zero are computed again, with the
// weights as they are. The error of a sum has as many terms as the row, of either sign: it may be |x| |weight - rounded
// weight|, and is hardly ever more than kDeviations times its deviation, which is that through the root of D. At 768
// columns that leaves one sum in a hundred.
class ExactSums {
 public:
  static constexpr float kDeviations = 8;

  // weights [P, D], whose columns are multiplied by `factors` where there are any. `rounding` [P in whole vectors] is
  // filled: times |x|, it bounds the error of a sum.
  ExactSums(const ConstRows& weights, const float* factors, int64_t P, int64_t D, float* rounding)
      : weights_(weights), factors_(factors), P_(P), D_(D), rounding_(rounding) {
    const Timed timed(Work::packing);
    const float share = std::min(1.0f, kDeviations / std::sqrt(static_cast<float>(D)));
    std::fill_n(rounding, round_up(P, kLanes), -1.0f);  // no sum beyond P is near zero
    with_elements(weights.dtype, [&](auto elements) {
      for (int64_t p = 0; p < P; ++p) {
        Vec sums[kChains] = {};
        for_each_vector(elements, row_of(weights_, p), D_, [&](int chain, int64_t d, Vec weight) {
          if (factors_) weight *= load(factors_ + d);
          const Vec rest = weight - from_bfloat16(to_bfloat16(weight));
          sums[chain] += rest * rest;
        });
        rounding[p] = share * std::sqrt(static_cast<float>(sum_chains(sums)));
      }
    });
  }

  // sums [P] become x . weight + bias where they are near zero. x is a row of bfloat16, which `statistics` normalize;
  // null: it is taken as it is. bias [P]; null: none.
  void correct(const char* x, const RowStatistics* statistics, const float* bias, float* sums) const {
    const float norm = statistics ? std::sqrt(static_cast<float>(D_)) : norm_of(x);
    for (int64_t p = 0; p < P_; p += kLanes) {
      const Vec size = magnitude_of(load(sums + p)), bound = norm * load(rounding_ + p);
      for (uint32_t near = lanes_where(size <= bound); near; near &= near - 1) {
        const int64_t found = p + __builtin_ctz(near);
        sums[found] = exact(x, statistics, found) + (bias ? bias[found] : 0.0f);
      }
    }
  }

  // x . weight p
  float exact(const char* x, const RowStatistics* statistics, int64_t p) const {
    Vec sums[kChains] = {};
    with_elements(weights_.dtype, [&](auto elements) {
      const char* weight = row_of(weights_, p);
      for_each_vector(Elements<DType::bfloat16>{}, x, D_, [&](int chain, int64_t d, Vec value) {
        Vec factor = elements.load_part(weight + d * elements.kBytes, D_ - d);
        if (factors_) factor *= load(factors_ + d);
        sums[chain] += (statistics ? statistics->normalized(value) : value) * factor;
      });
    });
    return sum_of(sums);
  }

 private:
  static float sum_of(const Vec (&chains)[kChains]) {
    const Vec sums = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    return sum_by_halves<PETL_VECTOR_BYTES>(&sums);
  }

  float norm_of(const char* x) const {
    Vec squares[kChains] = {};
    for_each_vector(Elements<DType::bfloat16>{}, x, D_,
                    [&](int chain, int64_t, Vec value) { squares[chain] += value * value; });
    return std::sqrt(sum_of(squares));
  }

  ConstRows weights_;
  const float* factors_;
  int64_t P_, D_;
  const float* rounding_;
};
