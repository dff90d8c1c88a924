// Products of bfloat16 by the processor's own instruction: twice the rate of float32, and sums in float32.
// A part of path.inl.

// Two rows of bfloat16 as pairs: the lower half of each word from `first`, the upper from `second`.
inline Vec interleave(HalfBitsVec first, HalfBitsVec second) {
  return as_float(__builtin_convertvector(first, BitsVec) | __builtin_convertvector(second, BitsVec) << 16);
}

#ifdef PETL_BFLOAT16_PRODUCTS
// An Arithmetic whose words are pairs of bfloat16. Operands that are not bfloat16 are rounded to it.
struct PairArithmetic {
  static constexpr int kPerWord = 2;
  static bool rounds(DType dtype) { return dtype != DType::bfloat16; }
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  // Whether rows of this tensor are made of whole words, where they lie.
  static bool fits(const ConstRows& rows, int64_t width) {
    return rows.dtype == DType::bfloat16 && width % 2 == 0 && rows.stride % 2 == 0;
  }

  template <Part kPart, class Source>
  static HalfBitsVec narrow(Source, const char* source, int64_t count) {
    if constexpr (Source::kType == DType::bfloat16) {
      if (count >= kLanes) return kPart == Part::rounded ? read<HalfBitsVec>(source) : HalfBitsVec{};
    }
    const Vec value = Source::load_part(source, count);
    const HalfBitsVec rounded = to_bfloat16(value);
    return kPart == Part::rounded ? rounded : to_bfloat16(value - from_bfloat16(rounded));
  }

  template <Part kPart>
  static void pack_panel(const ConstRows& source, int64_t first_row, int64_t depth, int64_t columns, Panel panel,
                         float* packed) {
    with_elements(source.dtype, [&](auto elements) {
      for (int64_t k = 0; k < depth; k += 2) {
        const char* row = row_of(source, first_row + k);
        prefetch_panel(source, first_row + k + kRowsAhead, panel);
        prefetch_panel(source, first_row + k + kRowsAhead + 1, panel);
        for (int v = 0; v < panel.vectors; ++v, packed += kLanes) {
          const int64_t column = panel.column + v * kLanes, count = columns - column;
          const char* at = row + column * elements.kBytes;
          const HalfBitsVec second =
              k + 1 < depth ? narrow<kPart>(elements, at + source.stride * elements.kBytes, count) : HalfBitsVec{};
          store(packed, interleave(narrow<kPart>(elements, at, count), second));
        }
      }
    });
  }

  template <Part kPart>
  static void pack_transposed_panel(const ConstRows& source, int64_t depth, int64_t columns, Panel panel,
                                    float* packed) {
    const int64_t width = panel.vectors * kLanes;
    with_elements(source.dtype, [&](auto elements) {
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int64_t lanes = std::min<int64_t>(kLanes, depth - k);
        for (int64_t j = 0; j < width; ++j) {
          const bool inside = panel.column + j < columns;
          const char* at = inside ? row_of(source, panel.column + j) + k * elements.kBytes : nullptr;
          const HalfBitsVec value = inside ? narrow<kPart>(elements, at, lanes) : HalfBitsVec{};
          for (int64_t lane = 0; lane < lanes; lane += 2) {
            memcpy(packed + (k + lane) / 2 * width + j, reinterpret_cast<const uint16_t*>(&value) + lane, 4);
          }
        }
      }
    });
  }

  static Left rows_as_left(const ConstRows& source, int64_t begin, int64_t, int64_t, float*) {
    const Timed timed(Work::conversions);
    return {reinterpret_cast<const float*>(row_of(source, begin)), source.stride / 2, 1};
  }

  // In place: the pairs of a row take the first half of its room. The stride must be a multiple of two vectors.
  static Left values_as_left(float* values, int64_t rows, int64_t stride) {
    const Timed timed(Work::conversions);
    for (int64_t row = 0; row < rows; ++row) {
      float* from = values + row * stride;
      for (int64_t i = 0; i < stride; i += 2 * kLanes) {
        const HalfBitsVec pairs[] = {to_bfloat16(load(from + i)), to_bfloat16(load(from + i + kLanes))};
        memcpy(from + i / 2, pairs, sizeof pairs);
      }
    }
    return {values, stride, 1};
  }

  static void gather(const float* values, int64_t rows, int64_t stride, float* target) {
    const Timed timed(Work::conversions);
    for (int64_t row = 0; row < rows; row += 2, values += 2 * stride, target += stride) {
      for (int64_t i = 0; i < stride; i += kLanes) {
        const Vec second = row + 1 < rows ? load(values + stride + i) : Vec{};
        store(target + i, interleave(to_bfloat16(load(values + i)), to_bfloat16(second)));
      }
    }
  }
};

#endif

// Rounded keys change the sign of scores near zero, and with it ReLU's mask: the input gradient becomes 24 times less
// accurate than its own rounding. So scores that the rounding may have carried across zero are computed again, with the
// keys as they are. |x . (key - rounded key)| <= |x| |key - rounded key| bounds the error: at 768 columns that leaves
// four scores in a hundred. The largest score of a row is computed again as well: as the gate, it scales all the
// others.
class ExactScores {
 public:
  // `rounding` [P] is filled with |key - rounded key|.
  ExactScores(const ConstRows& keys, int64_t P, int64_t D, float* rounding) : keys_(keys), D_(D), rounding_(rounding) {
    const Timed timed(Work::packing);
    with_elements(keys.dtype, [&](auto elements) {
      for (int64_t p = 0; p < P; ++p) {
        Vec sums = {};
        for (int64_t d = 0; d < D; d += kLanes) {
          const Vec key = elements.load_part(row_of(keys, p) + d * elements.kBytes, D - d);
          const Vec rest = key - from_bfloat16(to_bfloat16(key));
          sums += rest * rest;
        }
        rounding[p] = std::sqrt(static_cast<float>(sum_lanes(sums)));
      }
    });
  }

  // The raw scores [P] of one row of x, which is bfloat16.
  void correct(const char* x, int64_t P, float* scores) const {
    const float norm = std::sqrt(dot(x, x, Elements<DType::bfloat16>{}));
    with_elements(keys_.dtype, [&](auto elements) {
      for (int64_t p = 0; p < P; ++p) {
        if (std::abs(scores[p]) <= norm * rounding_[p]) scores[p] = dot(x, row_of(keys_, p), elements);
      }
      const int64_t best = std::max_element(scores, scores + P) - scores;
      scores[best] = dot(x, row_of(keys_, best), elements);
    });
  }

 private:
  template <class Other>
  float dot(const char* x, const char* other, Other elements) const {
    Vec sums = {};
    for (int64_t d = 0; d < D_; d += kLanes) {
      sums += Elements<DType::bfloat16>::load_part(x + 2 * d, D_ - d) *
              elements.load_part(other + d * elements.kBytes, D_ - d);
    }
    return static_cast<float>(sum_lanes(sums));
  }

  const ConstRows& keys_;
  int64_t D_;
  const float* rounding_;
};
