// Products of bfloat16 by the processor's own instruction: twice the rate of float32, and sums in float32.
// A part of path.inl.

#ifdef PETL_BFLOAT16_PRODUCTS
#ifdef PETL_AVX512_BF16
constexpr uint16_t kFromTwoRows[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// Neighbors of a row as pairs.
inline Vec neighbors(HalfBitsVec first, HalfBitsVec second) {
  return (Vec)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
}

inline Vec interleave_rows(HalfBitsVec first, HalfBitsVec second) {
  return (Vec)_mm512_permutexvar_epi16(read<__m512i>(kFromTwoRows), (__m512i)neighbors(first, second));
}

// sum + the products of both elements of each pair
inline Vec multiply_add_pairs(Vec a, Vec b, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
inline Vec neighbors(HalfBitsVec first, HalfBitsVec second) {
  return (Vec)vcombine_u16((uint16x4_t)first, (uint16x4_t)second);
}

inline Vec interleave_rows(HalfBitsVec first, HalfBitsVec second) {
  const uint16x4x2_t halves = vzip_u16((uint16x4_t)first, (uint16x4_t)second);
  return (Vec)vcombine_u16(halves.val[0], halves.val[1]);
}

inline Vec multiply_add_pairs(Vec a, Vec b, Vec sum) {
  return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#endif

// An Arithmetic whose words are pairs of bfloat16. Operands that are not bfloat16 are rounded to it.
struct PairArithmetic {
  static constexpr int kPerWord = 2;
#ifdef PETL_MATRIX_PRODUCTS
  static constexpr bool kInMatrices = true;
#else
  static constexpr bool kInMatrices = false;
#endif
  static bool rounds(DType dtype) { return dtype != DType::bfloat16; }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return multiply_add_pairs(a, b, sum); }

  // Two rows of bfloat16 as pairs: the lower half of each word from `first`, the upper from `second`.
  static Vec interleave(HalfBitsVec first, HalfBitsVec second) { return interleave_rows(first, second); }

  static Vec sum_of_words(Vec words) { return as_float(as_bits(words) << 16) + as_float(as_bits(words) & 0xffff0000u); }

  // Whether rows of this tensor are made of whole words, where they lie.
  static bool fits(const ConstRows& rows, int64_t width) {
    return rows.dtype == DType::bfloat16 && width % 2 == 0 && rows.stride % 2 == 0;
  }

  // A vector of elements, of which `count` are left in their row; beyond them zeros.
  template <Part kPart, class Source>
  static HalfBitsVec narrow(Source, const char* source, int64_t count, const float* factors = nullptr) {
    if (count <= 0) return HalfBitsVec{};
    if constexpr (Source::kType == DType::bfloat16) {
      if (count >= kLanes && !factors) return kPart == Part::rounded ? read<HalfBitsVec>(source) : HalfBitsVec{};
    }
    Vec value = Source::load_part(source, count);
    if (factors) value *= load(factors);
    const HalfBitsVec rounded = to_bfloat16(value);
    return kPart == Part::rounded ? rounded : to_bfloat16(value - from_bfloat16(rounded));
  }

  // As in FloatArithmetic.
  template <Part kPart, class Source>
  static Vec words_along(Source elements, const char* source, int64_t count, const float* factors) {
    return neighbors(narrow<kPart>(elements, source, count, factors),
                     narrow<kPart>(elements, source + kLanes * elements.kBytes, count - kLanes,
                                   factors ? factors + kLanes : nullptr));
  }

  template <Part kPart, class Source>
  static Vec words_across(Source elements, const char* source, const char* next, int64_t count) {
    return interleave(narrow<kPart>(elements, source, count),
                      next ? narrow<kPart>(elements, next, count) : HalfBitsVec{});
  }

  static Left rows_as_left(const ConstRows& source, int64_t begin, int64_t rows, int64_t width, float* scratch) {
    if (fits(source, width)) return {reinterpret_cast<const float*>(row_of(source, begin)), source.stride / 2, 1};
    const Timed timed(Work::conversions);
    const int64_t stride = round_up(width, 2 * kLanes) / 2;
    with_elements(source.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* from = row_of(source, begin + row);
        for (int64_t i = 0; i < width; i += 2 * kLanes) {
          store(scratch + row * stride + i / 2,
                words_along<Part::rounded>(elements, from + i * elements.kBytes, width - i, nullptr));
        }
      }
    });
    return {scratch, stride, 1};
  }

  // The rows of a left operand, as a tensor.
  static ConstRows rows_of(const Left& left) { return {left.data, 2 * left.row, DType::bfloat16}; }

  // In place: the pairs of a row take the first half of its room. The stride must be a multiple of two vectors.
  static Left values_as_left(float* values, int64_t rows, int64_t stride) {
    const Timed timed(Work::conversions);
    for (int64_t row = 0; row < rows; ++row) {
      float* from = values + row * stride;
      for (int64_t i = 0; i < stride; i += 2 * kLanes) {
        store(from + i / 2, neighbors(to_bfloat16(load(from + i)), to_bfloat16(load(from + i + kLanes))));
      }
    }
    return {values, stride, 1};
  }

  static Vec words_of_rows(const float* values, int64_t row, int64_t rows, int64_t stride, int64_t column) {
    const float* first = values + row * stride + column;
    const Vec second = row + 1 < rows ? load(first + stride) : Vec{};
    return interleave(to_bfloat16(load(first)), to_bfloat16(second));
  }
};
#endif
