// Sums of rounded factors, where their sign matters.
// A part of path.inl.

// Rounded weights change the sign of sums near zero, and with it ReLU's mask: the input gradient becomes 24 times less
// accurate than its own rounding. So sums that rounding may have carried across zero are made exact, by their products
// with what rounding took away. What a sum lacks has as many terms as the row, of either sign: it may be |x| |weight -
// rounded weight|, and is hardly ever more than kDeviations times its deviation, which is that through the root of D.
// At 768 columns that leaves one sum in two hundred.
template <class Arithmetic>
class ExactSums {
 public:
  static constexpr float kDeviations = 5;
  static constexpr int64_t kNone = -1;

  // What it keeps of the weights, in memory of others.
  struct Memory {
    float* rests;     // [P, words of D in whole vectors]: the weights but for what their rounding left
    float* sums;      // [P], over each
    float* rounding;  // [P in whole vectors]: times |x|, it bounds what a sum lacks

    Memory(bool is_needed, int64_t P, int64_t D, Partition& partition)
        : rests(partition.take(is_needed ? P * width(D) : 0)),
          sums(partition.take(is_needed ? P : 0)),
          rounding(partition.take(is_needed ? round_up(P, kLanes) : 0)) {}
  };

  // weights [P, D], whose columns are multiplied by `factors` where there are any.
  ExactSums(const ConstRows& weights, const float* factors, int64_t P, int64_t D, const Memory& memory)
      : P_(P), D_(D), memory_(memory) {
    const Timed timed(Work::packing);
    constexpr int64_t kElements = Arithmetic::kPerWord * kLanes;
    const float share = std::min(1.0f, kDeviations / std::sqrt(static_cast<float>(D)));
    std::fill_n(memory.rounding, round_up(P, kLanes), -1.0f);  // no sum beyond P is near zero
    with_elements(weights.dtype, [&](auto elements) {
      for (int64_t p = 0; p < P; ++p) {
        Vec squares = {}, sum = {};
        float* target = memory.rests + p * width(D_);
        for (int64_t d = 0; d < D_; d += kElements, target += kLanes) {
          const Vec rest = Arithmetic::template words_along<Part::rest>(
              elements, row_of(weights, p) + d * elements.kBytes, D_ - d, factors ? factors + d : nullptr);
          squares = Arithmetic::multiply_add(rest, rest, squares);
          sum += Arithmetic::sum_of_words(rest);
          store(target, rest);
        }
        memory_.sums[p] = sum_by_halves<PETL_VECTOR_BYTES>(&sum);
        memory_.rounding[p] = share * std::sqrt(sum_by_halves<PETL_VECTOR_BYTES>(&squares));
      }
    });
  }

  // sums [P] are those of one row with the rounded weights: of x, in words, or of what `statistics` make of it. Those
  // near zero become exact, and number `also`.
  void correct(const float* x, const RowStatistics* statistics, int64_t also, float* sums) const {
    const float norm = std::sqrt(statistics ? static_cast<float>(D_) : squares_of(x));
    for (int64_t p = 0; p < P_; p += kLanes) {
      const Vec size = magnitude_of(load(sums + p)), bound = norm * load(memory_.rounding + p);
      uint32_t near = lanes_where(size <= bound);
      if (also >= p && also < p + kLanes) near |= 1u << (also - p);
      for (; near; near &= near - 1) {
        const int64_t found = p + __builtin_ctz(near);
        sums[found] += rest_of(x, statistics, found);
      }
    }
  }

 private:
  static int64_t width(int64_t D) { return round_up(words<Arithmetic>(D), kLanes); }

  float rest_of(const float* x, const RowStatistics* statistics, int64_t p) const {
    const float rest = dot(x, memory_.rests + p * width(D_));
    if (!statistics) return rest;
    return ((rest - statistics->mean * memory_.sums[p]) - statistics->mean_rest * memory_.sums[p]) *
           statistics->inverse;
  }

  float dot(const float* x, const float* rest) const {
    return over_row(
        x, [&](Vec value, int64_t k, Vec sum) { return Arithmetic::multiply_add(value, load(rest + k), sum); });
  }

  float squares_of(const float* x) const {
    return over_row(x, [&](Vec value, int64_t, Vec sum) { return Arithmetic::multiply_add(value, value, sum); });
  }

  // The sum of what `add` makes of the words of a row, the number of the first of them and the sum so far.
  template <class Add>
  float over_row(const float* x, const Add& add) const {
    Vec sums[kChains] = {};
    for_each_vector(Floats{}, reinterpret_cast<const char*>(x), words<Arithmetic>(D_),
                    [&](int chain, int64_t k, Vec value) { sums[chain] = add(value, k, sums[chain]); });
    const Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return sum_by_halves<PETL_VECTOR_BYTES>(&total);
  }

  int64_t P_, D_;
  Memory memory_;
};
