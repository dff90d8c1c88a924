// Sums of rounded factors, where their sign matters.
// A part of path.inl.

// Rounded weights change the sign of sums near zero, and with it ReLU's mask: the input gradient becomes 24 times less
// accurate than its own rounding. So sums that rounding may have carried across zero are computed again in float32,
// with the weights as they are; a second product with what rounding left would not do, since one wrong sign in 400 000
// errs more than all rounding. What a sum lacks has as many terms as the row, of either sign: it may be |x| |weight -
// rounded weight|, and is hardly ever more than kDeviations times its deviation, which is that through the root of D.
// At 768 columns that leaves one sum in two hundred.
template <class Arithmetic>
class ExactSums {
 public:
  static constexpr float kDeviations = 6;

  // weights [P, D], whose columns are multiplied by `factors` where there are any. `rounding` [P in whole vectors] is
  // filled: times |x|, it bounds what a sum lacks.
  ExactSums(const ConstRows& weights, const float* factors, int64_t P, int64_t D, float* rounding)
      : weights_(weights), factors_(factors), P_(P), D_(D), rounding_(rounding) {
    const Timed timed(Work::packing);
    const float share = std::min(1.0f, kDeviations / std::sqrt(static_cast<float>(D)));
    std::fill_n(rounding, round_up(P, kLanes), -1.0f);  // no sum beyond P is near zero
    with_elements(weights.dtype, [&](auto elements) {
      for (int64_t p = 0; p < P; ++p) {
        const char* weight = row_of(weights_, p);
        rounding[p] = share * std::sqrt(over_row(elements, weight, D_, [&](Vec value, int64_t d, Vec sum) {
                        if (factors_) value *= load(factors_ + d);
                        const Vec rest = value - from_bfloat16(to_bfloat16(value));
                        return sum + rest * rest;
                      }));
      }
    });
  }

  // sums [P] are those of one row with the rounded weights, and `bias` [P], null: none: of x, in words, or of what
  // `statistics` make of it. Those near zero become exact.
  void correct(const float* x, const RowStatistics* statistics, const float* bias, float* sums) const {
    const float norm = std::sqrt(statistics ? static_cast<float>(D_) : squares_of(x));
    for (int64_t p = 0; p < P_; p += kLanes) {
      const Vec size = magnitude_of(load(sums + p)), bound = norm * load(rounding_ + p);
      for (uint32_t near = lanes_where(size <= bound); near; near &= near - 1) {
        const int64_t found = p + __builtin_ctz(near);
        sums[found] = exact(x, statistics, found) + (bias ? bias[found] : 0.0f);
      }
    }
  }

 private:
  using Factor = Elements<Arithmetic::kPerWord == 1 ? DType::float32 : DType::bfloat16>;

  // x . weight p, of what `statistics` and the factors make of x where there are statistics.
  float exact(const float* x, const RowStatistics* statistics, int64_t p) const {
    const char* row = reinterpret_cast<const char*>(x);
    float result = 0;
    with_elements(weights_.dtype, [&](auto elements) {
      const char* weights = row_of(weights_, p);
      const auto weight = [&](int64_t d) { return elements.load_part(weights + d * elements.kBytes, D_ - d); };
      if (statistics) {
        const RowStatistics of = *statistics;
        result = over_row(Factor{}, row, D_, [&](Vec value, int64_t d, Vec sum) {
          return sum + of.normalized(value) * (weight(d) * load(factors_ + d));
        });
      } else {
        result = over_row(Factor{}, row, D_, [&](Vec value, int64_t d, Vec sum) { return sum + value * weight(d); });
      }
    });
    return result;
  }

  float squares_of(const float* x) const {
    return over_row(Floats{}, reinterpret_cast<const char*>(x), words<Arithmetic>(D_),
                    [&](Vec value, int64_t, Vec sum) { return Arithmetic::multiply_add(value, value, sum); });
  }

  // The sum of what `add` makes of the vectors of a row, the number of their first element and the sum so far.
  template <class Source, class Add>
  static float over_row(Source elements, const char* row, int64_t width, const Add& add) {
    Vec sums[kChains] = {};
    for_each_vector(elements, row, width,
                    [&](int chain, int64_t at, Vec value) { sums[chain] = add(value, at, sums[chain]); });
    const Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return sum_by_halves<PETL_VECTOR_BYTES>(&total);
  }

  ConstRows weights_;
  const float* factors_;
  int64_t P_, D_;
  const float* rounding_;
};
