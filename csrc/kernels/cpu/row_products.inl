// Matrix products of rows where they lie: nothing is packed, and a row may be anywhere. For operands of which each row
// meets few others, packing would cost as much as the product.
// A part of path.inl.

// Rows of float32 in whole vectors lie so far apart: an odd number of cache lines, since rows of 1024 floats would all
// want the same few places in the cache.
inline int64_t spread_width(int64_t D) { return round_up(D, 32) + 16; }

template <int kBytes>
struct FloatsOf {
  typedef float Type __attribute__((vector_size(kBytes)));
};

// Of so many bytes of floats, halves added to halves.
template <int kBytes>
inline float sum_by_halves(const void* values) {
  if constexpr (kBytes == sizeof(float)) {
    return read<float>(values);
  } else {
    using Half = typename FloatsOf<kBytes / 2>::Type;
    const Half sum = read<Half>(values) + read<Half>(static_cast<const char*>(values) + kBytes / 2);
    return sum_by_halves<kBytes / 2>(&sum);
  }
}

// So many vectors of a row are summed before their sum is added to the others': the rounding errors of one long chain
// grow with its length, and more so where vectors are short.
constexpr int64_t kVectorsPerSum = 32;

// products[m * stride + n] = left[m] . right[n], for rows of so many words (see Arithmetic in gemm.inl). Each product
// is summed in the same order, whatever kLeft and kRight are.
template <class Arithmetic, int kLeft, int kRight>
__attribute__((noinline)) void dot_rows(const float* const* left, const float* const* right, int64_t words,
                                        float* products, int64_t stride) {
  Vec total[kLeft][kRight] = {};
  for (int64_t k = 0; k < words;) {
    Vec sum[kLeft][kRight] = {};
    const auto add = [&](int64_t count) {
      Vec a[kLeft];
#pragma GCC unroll 8
      for (int m = 0; m < kLeft; ++m) a[m] = Floats::load_part(left[m] + k, count);
#pragma GCC unroll 16
      for (int n = 0; n < kRight; ++n) {
        const Vec b = Floats::load_part(right[n] + k, count);
#pragma GCC unroll 8
        for (int m = 0; m < kLeft; ++m) sum[m][n] = Arithmetic::multiply_add(a[m], b, sum[m][n]);
      }
    };
    const int64_t end = std::min(words, k + kVectorsPerSum * kLanes);
    for (; k + kLanes <= end; k += kLanes) add(kLanes);
    if (k < end) add(end - k);
    k = end;
#pragma GCC unroll 8
    for (int m = 0; m < kLeft; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kRight; ++n) total[m][n] += sum[m][n];
    }
  }
  for (int m = 0; m < kLeft; ++m) {
    for (int n = 0; n < kRight; ++n) products[m * stride + n] = sum_by_halves<PETL_VECTOR_BYTES>(&total[m][n]);
  }
}

using DotRows = void (*)(const float* const* left, const float* const* right, int64_t words, float* products,
                         int64_t stride);

template <class Arithmetic, int kLeft, int... kRight>
constexpr std::array<DotRows, sizeof...(kRight)> dot_rows_by_right(std::integer_sequence<int, kRight...>) {
  return {dot_rows<Arithmetic, kLeft, kRight + 1>...};
}

// products [left_rows, stride] = left right^T
template <class Arithmetic>
inline void multiply_along_rows(const float* const* left, int64_t left_rows, const float* const* right,
                                int64_t right_rows, int64_t words, float* products, int64_t stride) {
  const Timed timed(Work::products);
  constexpr std::make_integer_sequence<int, kTileRows> kRight;
  constexpr auto kSeveral = dot_rows_by_right<Arithmetic, kPanelVectors>(kRight);
  constexpr auto kOne = dot_rows_by_right<Arithmetic, 1>(kRight);
  for (int64_t m = 0; m < left_rows;) {
    const bool several = m + kPanelVectors <= left_rows;
    for (int64_t n = 0; n < right_rows; n += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, right_rows - n);
      (several ? kSeveral : kOne)[count - 1](left + m, right + n, words, products + m * stride + n, stride);
    }
    m += several ? kPanelVectors : 1;
  }
}

// sums [kRows, kVectors] += left * right, where row k of `right` is rows[k], from its word `column` on. The one vector
// of kVectors = 1 may be the last of its row, with `count` words.
template <class Arithmetic, int kRows, int kVectors>
__attribute__((noinline)) void accumulate_rows(Left left, int64_t depth, const float* const* rows, int64_t column,
                                               int64_t count, Sums& sums) {
  Vec sum[kRows][kVectors] = {};
  const float* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.step) {
    const float* row = rows[k] + column;
    Vec b[kVectors];
    if constexpr (kVectors == 1) {
      b[0] = Floats::load_part(row, count);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) b[v] = load(row + v * kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = broadcast(a + m * left.row);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] = Arithmetic::multiply_add(factor, b[v], sum[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[m * kVectors + v] += sum[m][v];
  }
}

using AccumulateRows = void (*)(Left left, int64_t depth, const float* const* rows, int64_t column, int64_t count,
                                Sums& sums);

template <class Arithmetic, int kVectors, int... kRow>
constexpr std::array<AccumulateRows, sizeof...(kRow)> accumulate_rows_by_rows(std::integer_sequence<int, kRow...>) {
  return {accumulate_rows<Arithmetic, kRow + 1, kVectors>...};
}

// A product with rows as its right operand.
struct RowProduct {
  Left left;
  int64_t depth;  // in words
  const float* const* rows;
};

// The sum of the products, [rows, columns], to an epilogue as those of gemm.inl, but without its prefetch.
template <class Arithmetic, size_t kProducts, class Epilogue>
inline void multiply_across_rows(int64_t rows, int64_t columns, const RowProduct (&products)[kProducts],
                                 const Epilogue& epilogue) {
  constexpr std::make_integer_sequence<int, kTileRows> kRows;
  constexpr auto kPanel = accumulate_rows_by_rows<Arithmetic, kPanelVectors>(kRows);
  constexpr auto kVector = accumulate_rows_by_rows<Arithmetic, 1>(kRows);
  for (int64_t column = 0; column < columns;) {
    const bool whole = column + kPanelVectors * kLanes <= columns;
    const int vectors = whole ? kPanelVectors : 1;
    for (int64_t begin = 0; begin < rows; begin += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - begin);
      Sums sums = {};
      for (const RowProduct& product : products) {
        const Timed timed(Work::products);
        const Left left{product.left.data + begin * product.left.row, product.left.row, product.left.step};
        (whole ? kPanel : kVector)[count - 1](left, product.depth, product.rows, column, columns - column, sums);
      }
      const Timed timed(Work::results);
      for (int64_t m = 0; m < count; ++m) {
        for (int v = 0; v < vectors; ++v) epilogue(begin + m, column + v * kLanes, sums[m * vectors + v]);
      }
    }
    column += vectors * kLanes;
  }
}

// Rows of D elements as operands of both products. `scratch` holds `most` rows of spread_width(D).
template <class Arithmetic>
class RowOperand {
 public:
  RowOperand(int64_t most, int64_t D, float* scratch) : D_(D), scratch_(scratch), along_(most), across_(most) {}

  // row_at(i) is the address of row i.
  template <class RowAt>
  void take(int64_t count, DType dtype, const RowAt& row_at) {
    const Timed timed(Work::conversions);
    count_ = count;
    for (int64_t i = 0; i < count; ++i) along_[i] = words_of(row_at(i), dtype, i);
    if constexpr (Arithmetic::kPerWord == 1) {
      across_ = along_;
    } else {
      for (int64_t i = 0; i < count; i += 2)
        across_[i / 2] = merged(row_at(i), i + 1 < count ? row_at(i + 1) : nullptr, i / 2);
    }
  }

  int64_t count() const { return count_; }
  // Words hold neighbors of a row, words<Arithmetic>(D) of them.
  const float* const* along() const { return along_.data(); }
  // Words hold neighbors of a column: words<Arithmetic>(count) rows of D.
  const float* const* across() const { return across_.data(); }

 private:
  // Where they lie, if they are words already.
  const float* words_of(const char* row, DType dtype, int64_t i) {
    if (Arithmetic::kPerWord > 1 || dtype == DType::float32) return reinterpret_cast<const float*>(row);
    widen_row({row, 0, dtype}, D_, scratch_ + i * spread_width(D_));
    return scratch_ + i * spread_width(D_);
  }

  // Two rows of bfloat16 as pairs; there may be no second.
  const float* merged(const char* first, const char* second, int64_t i) {
    float* target = scratch_ + i * spread_width(D_);
    for (int64_t d = 0; d < D_; d += kLanes) {
      const HalfBitsVec upper = second ? read_part(second, d) : HalfBitsVec{};
      store(target + d, Arithmetic::interleave(read_part(first, d), upper));
    }
    return target;
  }

  HalfBitsVec read_part(const char* row, int64_t d) const {
    if (d + kLanes <= D_) return read<HalfBitsVec>(row + 2 * d);
    HalfBitsVec part = {};
    memcpy(&part, row + 2 * d, 2 * (D_ - d));
    return part;
  }

  int64_t D_, count_ = 0;
  float* scratch_;
  std::vector<const float*> along_, across_;
};
