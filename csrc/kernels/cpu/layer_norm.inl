// LayerNorm's statistics, and values normalized by them.
// A part of path.inl.

struct RowStatistics {
  // The mean is the sum of both: rounded to one float, it would shift a row whose mean is far greater than its
  // deviations.
  float mean, mean_rest;
  float inverse;  // of sqrt(variance + epsilon)

  Vec normalized(Vec value) const { return ((value - mean) - mean_rest) * inverse; }
};

// Calls use(chain, d, value) for the vectors of a row of D elements, value beginning at element d; what lies beyond the
// row is zero. Sums are made in kChains chains, since an addition waits for the one before.
constexpr int kChains = 4;

template <class Elements, class Use, int... kChain>
inline void for_each_vector(Elements elements, const char* row, int64_t D, const Use& use,
                            std::integer_sequence<int, kChain...>) {
  int64_t d = 0;
  for (; d + kChains * kLanes <= D; d += kChains * kLanes) {
    // Not a loop: GCC would keep the sums in memory.
    (use(kChain, d + kChain * kLanes, elements.load(row + (d + kChain * kLanes) * elements.kBytes)), ...);
  }
  for (; d < D; d += kLanes) use(0, d, elements.load_part(row + d * elements.kBytes, D - d));
}

template <class Elements, class Use>
inline void for_each_vector(Elements elements, const char* row, int64_t D, const Use& use) {
  for_each_vector(elements, row, D, use, std::make_integer_sequence<int, kChains>());
}

inline double sum_chains(const Vec (&sums)[kChains]) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// The same in float32, which is several times as fast and as good for a row of bfloat16.
inline double sum_chains_by_halves(const Vec (&sums)[kChains]) {
  const Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum_by_halves<PETL_VECTOR_BYTES>(&total);
}

// In two passes: the squares are those of deviations, never of the values.
template <class Elements>
inline RowStatistics statistics_of(Elements elements, const char* row, int64_t D, float epsilon) {
  const auto total = Elements::kType == DType::bfloat16 ? sum_chains_by_halves : sum_chains;
  Vec sums[kChains] = {}, rests[kChains] = {}, squares[kChains] = {};
  for_each_vector(elements, row, D, [&](int chain, int64_t, Vec value) { sums[chain] += value; });
  const float mean = static_cast<float>(total(sums) / D);
  for_each_vector(elements, row, D, [&](int chain, int64_t d, Vec value) {
    Vec deviation = value - mean;
    for (int64_t lane = D - d; lane < kLanes; ++lane) deviation[lane] = 0;
    rests[chain] += deviation;
    squares[chain] += deviation * deviation;
  });
  const double rest = total(rests) / D, variance = total(squares) / D - rest * rest;
  return {mean, static_cast<float>(rest), static_cast<float>(1 / std::sqrt(variance + epsilon))};
}
