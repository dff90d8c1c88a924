// Matrix products from one register-blocked microkernel, with the caller's arithmetic on each result.
// No include guard: each path includes it once, inside its own namespace (see avx512.cpp).

// Columns of the right operand are packed into panels of at most kPanelVectors vectors, so that the microkernel reads
// it in storage order; kTileRows x kPanelVectors accumulators fill the registers of the path.
constexpr int kTileRows = PETL_TILE_ROWS;
constexpr int kPanelVectors = PETL_PANEL_VECTORS;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Panel {
  int64_t column;  // the first
  int vectors;
};

// The panels of a right operand [depth, columns]; as even as they can be, since a narrow one wastes the microkernel.
class Panels {
 public:
  explicit Panels(int64_t columns)
      : vectors_(round_up(columns, kLanes) / kLanes), count_(round_up(vectors_, kPanelVectors) / kPanelVectors) {}
  int64_t count() const { return count_; }
  int64_t padded_columns() const { return vectors_ * kLanes; }
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

// target[i] = row[i] in float32, for i < width; `target` has room for whole vectors.
inline void widen(const char* row, DType dtype, int64_t width, float* target) {
  for (int64_t i = 0; i < width; i += kLanes) {
    store(target + i, load_part(dtype, row + i * size_of(dtype), width - i));
  }
}

// Rows [begin, begin + count) as float32: where they lie, or widened into `scratch` [count, padded width].
struct FloatRows {
  const float* data;
  int64_t stride;
};

inline FloatRows as_floats(const ConstRows& rows, int64_t begin, int64_t count, int64_t width, float* scratch) {
  if (rows.dtype == DType::float32) return {reinterpret_cast<const float*>(row_of(rows, begin)), rows.stride};
  const int64_t stride = round_up(width, kLanes);
  for (int64_t row = 0; row < count; ++row) {
    widen(row_of(rows, begin + row), rows.dtype, width, scratch + row * stride);
  }
  return {scratch, stride};
}

// One panel of the right operand `source` [depth, columns], each row times its factor; `factors` may be null.
inline void pack_panel(const ConstRows& source, int64_t first_row, int64_t depth, int64_t columns, Panel panel,
                       const float* factors, float* packed) {
  for (int64_t k = 0; k < depth; ++k) {
    const char* row = row_of(source, first_row + k);
    const float factor = factors ? factors[k] : 1.0f;
    for (int v = 0; v < panel.vectors; ++v, packed += kLanes) {
      const int64_t column = panel.column + v * kLanes;
      store(packed, load_part(source.dtype, row + column * size_of(source.dtype), columns - column) * factor);
    }
  }
}

// All panels of the right operand `source` [depth, columns], one after the other: depth x padded_columns floats.
inline void pack(const ConstRows& source, int64_t depth, int64_t columns, float* packed) {
  const Panels panels(columns);
  for (int64_t i = 0; i < panels.count(); ++i) {
    pack_panel(source, 0, depth, columns, panels[i], nullptr, packed + panels[i].column * depth);
  }
}

// The same of the transpose of `source` [columns, depth]. Lines of the source are read a vector at a time, since a
// stride of a whole row would miss the cache at every element.
inline void pack_transposed(const ConstRows& source, int64_t depth, int64_t columns, float* packed) {
  const Panels panels(columns);
  for (int64_t i = 0; i < panels.count(); ++i) {
    const Panel panel = panels[i];
    const int64_t width = panel.vectors * kLanes;
    float* target = packed + panel.column * depth;
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, depth - k);
      for (int64_t j = 0; j < width; ++j) {
        Vec value = {};
        if (panel.column + j < columns) {
          value = load_part(source.dtype, row_of(source, panel.column + j) + k * size_of(source.dtype), lanes);
        }
        for (int64_t lane = 0; lane < lanes; ++lane) target[(k + lane) * width + j] = value[lane];
      }
    }
  }
}

// The left operand of a product: element (m, k) is data[m * row + k * step].
struct Left {
  const float* data;
  int64_t row, step;
};

// A long sum is made of sums of this many products: its rounding error grows with the root of the longer of the two,
// and moving the accumulators out of the registers costs nothing at this length.
constexpr int64_t kProductsPerSum = 128;

template <int kRows, int kVectors>
using Sums = Vec[kRows][kVectors];

// sum += left * packed over `depth` products.
template <int kRows, int kVectors>
inline void accumulate(Left left, int64_t depth, const float* packed, Sums<kRows, kVectors>& total) {
  Sums<kRows, kVectors> sum = {};
  const float* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.step, packed += kVectors * kLanes) {
    Vec b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = load(packed + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = broadcast(a[m * left.row]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] += factor * b[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[m][v] += sum[m][v];
  }
}

// kRows x kVectors vectors of the product of `left` and one packed panel; emit(m, v, value) takes each.
template <int kRows, int kVectors, class Emit>
inline void multiply_tile(Left left, int64_t depth, const float* packed, const Emit& emit) {
  Sums<kRows, kVectors> total = {};
  for (int64_t k = 0; k < depth; k += kProductsPerSum) {
    accumulate<kRows, kVectors>({left.data + k * left.step, left.row, left.step}, std::min(kProductsPerSum, depth - k),
                                packed + k * kVectors * kLanes, total);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) emit(m, v, total[m][v]);
  }
}

template <int kVectors, int kRows, class Emit>
inline void multiply_last_rows(int64_t rows, Left left, int64_t depth, const float* packed, const Emit& emit) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_tile<kRows, kVectors>(left, depth, packed, emit);
    multiply_last_rows<kVectors, kRows - 1>(rows, left, depth, packed, emit);
  }
}

template <int kVectors, class Emit>
inline void multiply_panel_of(int64_t rows, Left left, int64_t depth, const float* packed, int64_t column,
                              const Emit& emit) {
  int64_t begin = 0;
  const auto emit_tile = [&](int m, int v, Vec value) { emit(begin + m, column + v * kLanes, value); };
  for (; begin + kTileRows <= rows; begin += kTileRows) {
    multiply_tile<kTileRows, kVectors>({left.data + begin * left.row, left.row, left.step}, depth, packed, emit_tile);
  }
  multiply_last_rows<kVectors, kTileRows - 1>(rows - begin, {left.data + begin * left.row, left.row, left.step}, depth,
                                              packed, emit_tile);
}

// emit(row, column, value) for each vector of the product of `left` [rows, depth] and one packed panel.
template <class Emit, int kVectors = kPanelVectors>
inline void multiply_panel(int64_t rows, Left left, int64_t depth, const float* packed, Panel panel, const Emit& emit) {
  if constexpr (kVectors > 0) {
    if (panel.vectors == kVectors) {
      return multiply_panel_of<kVectors>(rows, left, depth, packed, panel.column, emit);
    }
    multiply_panel<Emit, kVectors - 1>(rows, left, depth, packed, panel, emit);
  }
}

// The same for all panels of a packed right operand [depth, columns].
template <class Emit>
inline void multiply(int64_t rows, Left left, int64_t depth, const float* packed, const Panels& panels,
                     const Emit& emit) {
  for (int64_t i = 0; i < panels.count(); ++i) {
    multiply_panel(rows, left, depth, packed + panels[i].column * depth, panels[i], emit);
  }
}
