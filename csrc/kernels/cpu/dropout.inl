// Dropout of rows: Philox of kernels/dropout.h, on vectors of counters.
// A part of path.inl.

constexpr int kColumnsPerDraw = 4 * kLanes;
constexpr uint32_t kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct WideProduct {
  BitsVec lower, upper;
};

inline WideProduct multiply_wide(BitsVec word, uint32_t multiplier) {
  typedef uint64_t PairsVec __attribute__((vector_size(PETL_VECTOR_BYTES)));
  constexpr uint64_t kLower = 0xffffffff;
  const PairsVec pairs = (PairsVec)word;
  const PairsVec even = (pairs & kLower) * multiplier, odd = (pairs >> 32) * multiplier;
  return {word * multiplier, (BitsVec)(even >> 32 | (odd & ~kLower))};
}

inline void philox(BitsVec (&counter)[4], uint64_t key) {
  uint32_t first_key = static_cast<uint32_t>(key), second_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideProduct first = multiply_wide(counter[0], kPhiloxFirst);
    const WideProduct second = multiply_wide(counter[2], kPhiloxSecond);
    counter[0] = second.upper ^ counter[1] ^ first_key;
    counter[1] = second.lower;
    counter[2] = first.upper ^ counter[3] ^ second_key;
    counter[3] = first.lower;
    first_key += kPhiloxFirstStep;
    second_key += kPhiloxSecondStep;
  }
}

// How many floats keep_factors writes.
inline int64_t factors_width(int64_t columns) { return round_up(columns, kColumnsPerDraw); }

// By what the values of a row are multiplied: the scale, or zero where they are dropped.
inline void keep_factors(const Dropout& dropout, int64_t row, int64_t columns, float* factors) {
  for (int64_t column = 0; column < columns; column += kColumnsPerDraw) {
    BitsVec words[4] = {read<BitsVec>(kNumbers) + static_cast<uint32_t>(column / 4),
                        BitsVec{} + static_cast<uint32_t>(row), BitsVec{} + static_cast<uint32_t>(row >> 32),
                        BitsVec{} + static_cast<uint32_t>(dropout.seeds[1])};
    philox(words, static_cast<uint64_t>(dropout.seeds[0]));
    float kept[4][kLanes];
    for (int word = 0; word < 4; ++word) {
      store(kept[word], words[word] >= dropout.threshold ? Vec{} + dropout.scale : Vec{});
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int word = 0; word < 4; ++word) factors[column + 4 * lane + word] = kept[word][lane];
    }
  }
}

// values [columns in whole vectors] of one row
inline void multiply_by(const float* factors, int64_t columns, float* values) {
  for (int64_t i = 0; i < columns; i += kLanes) store(values + i, load(values + i) * load(factors + i));
}
