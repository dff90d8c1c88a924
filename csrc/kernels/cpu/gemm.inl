// Matrix products from one register-blocked microkernel, with the caller's arithmetic on each result.
// A part of path.inl.

// Columns of the right operand are packed into panels of at most kPanelVectors vectors, so that the microkernel reads
// it in storage order; kTileRows x kPanelVectors accumulators fill the registers of the path.
constexpr int kTileRows = PETL_TILE_ROWS;
constexpr int kPanelVectors = PETL_PANEL_VECTORS;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Panel {
  int64_t column;  // the first
  int vectors;

  int64_t width() const { return vectors * kLanes; }
  int64_t end() const { return column + width(); }
};

// The panels of a right operand with so many columns; as even as they can be, since a narrow one wastes the
// microkernel.
class Panels {
 public:
  explicit Panels(int64_t columns)
      : vectors_(round_up(columns, kLanes) / kLanes), count_(round_up(vectors_, kPanelVectors) / kPanelVectors) {}
  int64_t count() const { return count_; }
  Panel operator[](int64_t index) const {
    const int64_t even = vectors_ / count_, wider = vectors_ % count_;
    return {(index * even + std::min(index, wider)) * kLanes, static_cast<int>(even + (index < wider ? 1 : 0))};
  }

 private:
  int64_t vectors_, count_;
};

inline const char* row_of(const ConstRows& rows, int64_t row) {
  return static_cast<const char*>(rows.data) + row * rows.stride * size_of(rows.dtype);
}

inline char* row_of(const Rows& rows, int64_t row, int64_t width) {
  return static_cast<char*>(rows.data) + row * width * size_of(rows.dtype);
}

// The operands of a product hold words of 32 bits: a float32, or a pair of bfloat16 that are neighbors along the depth
// (see Arithmetic below). Element (m, k) of the left one is data[m * row + k * step], k counting words.
struct Left {
  const float* data;
  int64_t row, step;
};

// A long sum is made of sums of this many words: its rounding error grows with the root of the longer of the two, and
// moving the accumulators out of the registers costs nothing at this length. Matrix registers sum 32 products at a time
// and need none of it.
constexpr int64_t kWordsPerSum = 128;

// The results of one tile: [rows][vectors].
using Sums = Vec[kTileRows * kPanelVectors];

// sums, or nothing where they begin, += left * packed over `depth` words. Not inlined: it keeps all accumulators in
// registers whatever surrounds the call, and every epilogue shares it.
template <class Arithmetic, int kRows, int kVectors>
__attribute__((noinline)) void accumulate(Left left, int64_t depth, const float* packed, bool begins, Sums& sums) {
  Vec sum[kRows][kVectors] = {};
  const float* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.step, packed += kVectors * kLanes) {
    Vec b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = load(packed + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = broadcast(a + m * left.row);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] = Arithmetic::multiply_add(factor, b[v], sum[m][v]);
    }
  }
  if (!begins) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] += sums[m * kVectors + v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[m * kVectors + v] = sum[m][v];
  }
}

using Accumulate = void (*)(Left left, int64_t depth, const float* packed, bool begins, Sums& sums);

// accumulate for tiles of 1 to kTileRows rows.
template <class Arithmetic, int kVectors, int... kRow>
constexpr std::array<Accumulate, sizeof...(kRow)> accumulate_by_rows(std::integer_sequence<int, kRow...>) {
  return {accumulate<Arithmetic, kRow + 1, kVectors>...};
}

// Products hand each vector of results to an epilogue: epilogue(row, column, value). Before the last sums of a row,
// epilogue.prefetch(row, column, columns) may ask for the memory that its results will meet: it arrives meanwhile, and
// is not yet evicted by what is read until then.

// The product of `left` [rows, depth words] and one packed panel.
template <class Arithmetic, int kVectors = kPanelVectors, class Epilogue>
inline void multiply_panel(int64_t rows, Left left, int64_t depth, const float* packed, Panel panel,
                           const Epilogue& epilogue) {
  if constexpr (kVectors > 1) {
    if (panel.vectors < kVectors) {
      return multiply_panel<Arithmetic, kVectors - 1>(rows, left, depth, packed, panel, epilogue);
    }
  }
  constexpr int kWidth = kVectors * kLanes;
  constexpr auto kAccumulate = accumulate_by_rows<Arithmetic, kVectors>(std::make_integer_sequence<int, kTileRows>());
  for (int64_t begin = 0; begin < rows; begin += kTileRows) {
    const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - begin);
    const Accumulate add = kAccumulate[tile_rows - 1];
    Sums sums;
    Left tile{left.data + begin * left.row, left.row, left.step};
    int64_t k = 0;
    for (; k + kWordsPerSum < depth; k += kWordsPerSum, tile.data += kWordsPerSum * left.step) {
      const Timed timed(Work::products);
      add(tile, kWordsPerSum, packed + k * kWidth, k == 0, sums);
    }
    for (int64_t m = 0; m < tile_rows; ++m) epilogue.prefetch(begin + m, panel.column, kWidth);
    {
      const Timed timed(Work::products);
      add(tile, depth - k, packed + k * kWidth, k == 0, sums);
    }
    const Timed timed(Work::results);
    for (int64_t m = 0; m < tile_rows; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        epilogue(begin + m, panel.column + v * kLanes, sums[m * kVectors + v]);
      }
    }
  }
}

// The product of `left` [rows, depth words] and panels [first, last) of a right operand with so many columns, which are
// packed one after the other.
template <class Arithmetic, class Epilogue>
inline void multiply_panels(int64_t rows, Left left, int64_t depth, const float* packed, int64_t columns, int64_t first,
                            int64_t last, const Epilogue& epilogue) {
  if constexpr (Arithmetic::kInMatrices) {
    multiply_panels_in_matrices(rows, left, depth, packed, columns, first, last, epilogue);
  } else {
    const Panels panels(columns);
    for (int64_t i = first; i < last; ++i) {
      const int64_t offset = panels[i].column - panels[first].column;
      multiply_panel<Arithmetic>(rows, left, depth, packed + offset * depth, panels[i], epilogue);
    }
  }
}

// The same with all panels.
template <class Arithmetic, class Epilogue>
inline void multiply(int64_t rows, Left left, int64_t depth, const float* packed, int64_t columns,
                     const Epilogue& epilogue) {
  multiply_panels<Arithmetic>(rows, left, depth, packed, columns, 0, Panels(columns).count(), epilogue);
}

// Epilogue: target [rows, stride] in float32, whole vectors.
struct StoreFloats {
  float* target;
  int64_t stride;

  void prefetch(int64_t, int64_t, int64_t) const {}
  void operator()(int64_t row, int64_t column, Vec value) const { store(target + row * stride + column, value); }
};

// Epilogue: the same, added.
struct AddFloats {
  float* target;
  int64_t stride;

  void prefetch(int64_t, int64_t, int64_t) const {}
  void operator()(int64_t row, int64_t column, Vec value) const {
    float* at = target + row * stride + column;
    store(at, load(at) + value);
  }
};

// Epilogue: target [rows, width] in the type of its elements, of the sum with `addend` where there is one.
template <class Target>
struct StoreRows {
  char* target;
  int64_t width;
  const float* addend;  // [rows, width in whole vectors], or null

  void prefetch(int64_t row, int64_t column, int64_t columns) const {
    prefetch_lines<true>(target + (row * width + column) * Target::kBytes, columns * Target::kBytes);
  }
  void operator()(int64_t row, int64_t column, Vec value) const {
    if (addend) value += load(addend + row * round_up(width, kLanes) + column);
    Target::store_part(target + (row * width + column) * Target::kBytes, value, width - column);
  }
};

// What an operand stands for where its type is narrower than its tensor's: the value, rounded, or what rounding took
// away from it, rounded in turn.
enum class Part { rounded, rest };

// An Arithmetic says what a word is and brings operands into that form. This one: a word is a float32.
struct FloatArithmetic {
  static constexpr int kPerWord = 1;
  // Whether products are those of matrix registers: their left operand has step 1.
  static constexpr bool kInMatrices = false;
  static bool rounds(DType) { return false; }
  // Whether rows of this tensor can be a left operand (rows_as_left).
  static bool fits(const ConstRows&, int64_t) { return true; }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return a * b + sum; }
  // Of the elements of each word.
  static Vec sum_of_words(Vec words) { return words; }

  // A vector of words from an element on, of which `count` are left in its row: what is packed transposed.
  template <Part, class Source>
  static Vec words_along(Source elements, const char* source, int64_t count, const float*) {
    return elements.load_part(source, count);
  }

  // The same across kPerWord rows; in pairs the second may be null.
  template <Part, class Source>
  static Vec words_across(Source elements, const char* source, const char*, int64_t count) {
    return elements.load_part(source, count);
  }

  // Rows [begin, begin + rows) of a tensor as a left operand: where they lie, or widened into `scratch`.
  static Left rows_as_left(const ConstRows& source, int64_t begin, int64_t rows, int64_t width, float* scratch) {
    const Timed timed(Work::conversions);
    if (source.dtype == DType::float32) {
      return {reinterpret_cast<const float*>(row_of(source, begin)), source.stride, 1};
    }
    const int64_t stride = round_up(width, kLanes);
    with_elements(source.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* from = row_of(source, begin + row);
        for (int64_t i = 0; i < width; i += kLanes) {
          store(scratch + row * stride + i, elements.load_part(from + i * elements.kBytes, width - i));
        }
      }
    });
    return {scratch, stride, 1};
  }

  // The rows of a left operand, as a tensor.
  static ConstRows rows_of(const Left& left) { return {left.data, left.row, DType::float32}; }

  // values [rows, stride] as a left operand; the values may be overwritten.
  static Left values_as_left(float* values, int64_t, int64_t stride) { return {values, stride, 1}; }

  // A vector of words along the rows of values [rows, stride]: those of row `row` and on, from this column on.
  static Vec words_of_rows(const float* values, int64_t row, int64_t, int64_t stride, int64_t column) {
    return load(values + row * stride + column);
  }
};

template <class Arithmetic>
inline int64_t words(int64_t depth) {
  return round_up(depth, Arithmetic::kPerWord) / Arithmetic::kPerWord;
}

// values [rows, stride] as words along the rows: [words of rows, stride].
template <class Arithmetic>
inline void gather(const float* values, int64_t rows, int64_t stride, float* target) {
  const Timed timed(Work::conversions);
  for (int64_t row = 0; row < rows; row += Arithmetic::kPerWord, target += stride) {
    for (int64_t i = 0; i < stride; i += kLanes) {
      store(target + i, Arithmetic::words_of_rows(values, row, rows, stride, i));
    }
  }
}

// Packing reads a part of each row, which the processor does not foresee: so it asks for what it will read so many rows
// later.
constexpr int64_t kRowsAhead = 16;

// The right operand whose row k is row first_row + k of `source`: panels [first, last) of it, one after the other.
template <class Arithmetic, Part kPart = Part::rounded>
inline void pack_panels(const ConstRows& source, int64_t first_row, int64_t depth, int64_t columns, int64_t first,
                        int64_t last, float* packed) {
  constexpr int kPerWord = Arithmetic::kPerWord;
  const Timed timed(Work::packing);
  const Panels panels(columns);
  const int64_t begin = panels[first].column, end = std::min(columns, panels[last - 1].end());
  with_elements(source.dtype, [&](auto elements) {
    for (int64_t k = 0; k < depth; k += kPerWord) {
      const char* row = row_of(source, first_row + k);
      const char* next = k + 1 < depth ? row_of(source, first_row + k + 1) : nullptr;
      for (int ahead = 0; ahead < kPerWord; ++ahead) {
        const char* later = row_of(source, first_row + k + kRowsAhead + ahead);
        prefetch_lines<false>(later + begin * elements.kBytes, (end - begin) * elements.kBytes);
      }
      for (int64_t i = first; i < last; ++i) {
        const Panel panel = panels[i];
        float* target = packed + (panel.column - begin) * words<Arithmetic>(depth) + k / kPerWord * panel.width();
        for (int64_t column = panel.column; column < panel.end(); column += kLanes, target += kLanes) {
          const int64_t at = column * elements.kBytes;
          store(target, Arithmetic::template words_across<kPart>(elements, row + at, next ? next + at : nullptr,
                                                                 columns - column));
        }
      }
    }
  });
}

// A whole right operand [depth, columns]: words(depth) x padded columns.
template <class Arithmetic, Part kPart = Part::rounded>
inline void pack(const ConstRows& source, int64_t depth, int64_t columns, float* packed) {
  pack_panels<Arithmetic, kPart>(source, 0, depth, columns, 0, Panels(columns).count(), packed);
}

// sums [columns in whole vectors], over the depth of a packed right operand.
template <class Arithmetic>
inline void sum_packed(const float* packed, int64_t depth, int64_t columns, float* sums) {
  const Timed timed(Work::packing);
  const Panels panels(columns);
  for (int64_t i = 0; i < panels.count(); ++i) {
    const int64_t width = panels[i].vectors * kLanes, first = panels[i].column;
    std::fill_n(sums + first, width, 0.0f);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < width; j += kLanes) {
        store(sums + first + j,
              load(sums + first + j) + Arithmetic::sum_of_words(load(packed + first * depth + k * width + j)));
      }
    }
  }
}

// The right operand whose column j is row j of `source`, one panel of it, by squares: a stride of a whole row would
// miss the cache at every element. `factors` [depth in whole vectors] multiply the columns of the source; null: 1.
template <class Arithmetic, Part kPart>
inline void pack_transposed_panel(const ConstRows& source, int64_t depth, int64_t columns, Panel panel,
                                  const float* factors, float* packed) {
  constexpr int64_t kElements = Arithmetic::kPerWord * kLanes;
  const int64_t width = panel.vectors * kLanes;
  with_elements(source.dtype, [&](auto elements) {
    for (int64_t k = 0; k < depth; k += kElements) {
      const int64_t count = depth - k, rows = std::min<int64_t>(kLanes, words<Arithmetic>(count));
      float* target = packed + k / Arithmetic::kPerWord * width;
      for (int64_t j = 0; j < width; j += kLanes, target += kLanes) {
        Vec square[kLanes] = {};
        const int64_t inside = std::min<int64_t>(kLanes, columns - panel.column - j);
        for (int64_t i = 0; i < inside; ++i) {
          square[i] = Arithmetic::template words_along<kPart>(
              elements, row_of(source, panel.column + j + i) + k * elements.kBytes, count,
              factors ? factors + k : nullptr);
        }
        transpose(square);
        for (int64_t i = 0; i < rows; ++i) store(target + i * width, square[i]);
      }
    }
  });
}

template <class Arithmetic, Part kPart = Part::rounded>
inline void pack_transposed(const ConstRows& source, int64_t depth, int64_t columns, float* packed,
                            const float* factors = nullptr) {
  const Timed timed(Work::packing);
  const Panels panels(columns);
  for (int64_t i = 0; i < panels.count(); ++i) {
    pack_transposed_panel<Arithmetic, kPart>(source, depth, columns, panels[i], factors,
                                             packed + panels[i].column * words<Arithmetic>(depth));
  }
}
