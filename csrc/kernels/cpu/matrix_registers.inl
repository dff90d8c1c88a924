// Products of bfloat16 in the processor's matrix registers (AMX): one instruction adds 32 products to each of 16 x 16
// sums. A register holds up to 16 rows of 64 bytes; how many it has is configured for all of them at once.
// A part of path.inl.

// The registers by number: sums of 2 x 2 tiles and their operands, each of which meets two others: to load an operand
// takes half the time of a product, and on a shared machine at times twice a product's.
enum MatrixRegister { kSums = 0, kLeft = 4, kRight = 6, kMatrixRegisters = 8 };
constexpr int kMatrixRows = 16, kTileOfMatrices = 2 * kMatrixRows;

struct alignas(64) MatrixShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  // Of sums and left operands with so many rows.
  explicit MatrixShapes(int64_t row_count) {
    for (int i = 0; i < kMatrixRegisters; ++i) {
      bytes_per_row[i] = kLanes * sizeof(float);
      rows[i] = static_cast<uint8_t>(i < kRight ? row_count : kLanes);
    }
  }
};

#ifdef PETL_EMULATE_MATRIX_REGISTERS
#include "tests/matrix_registers.inl"
#else
// Instructions in assembler, since GCC's intrinsics take no register number that a template knows.
inline void configure(const MatrixShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void release() { asm volatile("tilerelease"); }

template <int kRegister>
inline void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}

template <int kRegister>
inline void load_matrix(const float* source, int64_t stride) {
  asm volatile("tileloadd (%0, %1, 1), %%tmm%c2" ::"r"(source), "r"(stride * sizeof(float)), "i"(kRegister) : "memory");
}

template <int kRegister>
inline void store_matrix(float* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0, %1, 1)" ::"r"(target), "r"(stride * sizeof(float)), "i"(kRegister)
               : "memory");
}

template <int kSum, int kFirst, int kSecond>
inline void multiply_matrices() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kFirst), "i"(kSecond));
}
#endif

// What one step of a tile multiplies: one or two registers of each operand, which hold a vector of words of the depth.
struct MatrixOperands {
  const float *left, *next_left;
  int64_t left_stride;
  const float* right;
  int64_t right_stride;
};

template <int kLefts, int kRights>
inline void multiply_step(const MatrixOperands& operands) {
  load_matrix<kLeft>(operands.left, operands.left_stride);
  load_matrix<kRight>(operands.right, operands.right_stride);
  multiply_matrices<kSums, kLeft, kRight>();
  if constexpr (kRights > 1) {
    load_matrix<kRight + 1>(operands.right + kLanes, operands.right_stride);
    multiply_matrices<kSums + 1, kLeft, kRight + 1>();
  }
  if constexpr (kLefts > 1) {
    load_matrix<kLeft + 1>(operands.next_left, operands.left_stride);
    multiply_matrices<kSums + 2, kLeft + 1, kRight>();
    if constexpr (kRights > 1) multiply_matrices<kSums + 3, kLeft + 1, kRight + 1>();
  }
}

// A row of tiles: `rows` at most kTileOfMatrices, of the left operand with its sums [rows, width of the panel].
class MatrixRows {
 public:
  // `end` holds the words of the depth beyond whole vectors, with zeros up to one; it is filled where there are some.
  MatrixRows(Left left, int64_t rows, int64_t depth, float* end) : left_(left), rows_(rows), depth_(depth), end_(end) {
    const int64_t rest = depth % kLanes;
    for (int64_t m = 0; m < rows && rest; ++m) {
      store(end + m * kLanes, Floats::load_part(left.data + m * left.row + depth - rest, rest));
    }
  }

  // By kRights vectors of a packed panel, whose words beyond whole vectors are in `right_end` likewise.
  template <int kRights>
  void multiply(const float* packed, const float* right_end, int64_t width, float* sums) const {
    if (rows_ > kMatrixRows) return multiply_by<2, kRights>(packed, right_end, width, sums);
    multiply_by<1, kRights>(packed, right_end, width, sums);
  }

 private:
  template <int kLefts, int kRights>
  void multiply_by(const float* packed, const float* right_end, int64_t width, float* sums) const {
    // The second register begins so that it ends with the rows: it may compute some again.
    const int64_t next = kLefts > 1 ? rows_ - kMatrixRows : 0;
    MatrixOperands operands{left_.data, left_.data + next * left_.row, left_.row, packed, width};
    clear<kSums>();
    clear<kSums + 1>();
    clear<kSums + 2>();
    clear<kSums + 3>();
    for (int64_t k = depth_ / kLanes; k > 0; --k) {
      multiply_step<kLefts, kRights>(operands);
      operands.left += kLanes;
      operands.next_left += kLanes;
      operands.right += kLanes * width;
    }
    if (depth_ % kLanes) {
      multiply_step<kLefts, kRights>({end_, end_ + next * kLanes, kLanes, right_end, width});
    }
    store_matrix<kSums>(sums, width);
    if constexpr (kRights > 1) store_matrix<kSums + 1>(sums + kLanes, width);
    if constexpr (kLefts > 1) store_matrix<kSums + 2>(sums + next * width, width);
    if constexpr (kLefts > 1 && kRights > 1) store_matrix<kSums + 3>(sums + next * width + kLanes, width);
  }

  Left left_;
  int64_t rows_, depth_;
  const float* end_;
};

template <class Epilogue>
inline void multiply_panel_in_matrices(int64_t rows, Left left, int64_t depth, const float* packed, Panel panel,
                                       const Epilogue& epilogue) {
  constexpr int64_t kWidth = kPanelVectors * kLanes;
  const int64_t width = panel.width(), rest = depth % kLanes, tile_rows = std::min<int64_t>(kTileOfMatrices, rows);
  alignas(64) float right_end[kLanes * kWidth], left_end[kTileOfMatrices * kLanes], sums[kTileOfMatrices * kWidth];
  if (rest) {
    memcpy(right_end, packed + (depth - rest) * width, rest * width * sizeof(float));
    std::fill(right_end + rest * width, right_end + kLanes * width, 0.0f);
  }
  for (int64_t begin = 0; begin < rows; begin += kTileOfMatrices) {
    // All tiles have as many rows, and so one configuration: the last computes some again.
    const int64_t first = std::min(begin, rows - tile_rows), end = first + tile_rows;
    for (int64_t m = begin; m < end; ++m) epilogue.prefetch(m, panel.column, width);
    {
      const Timed timed(Work::products);
      const MatrixRows tile({left.data + first * left.row, left.row, 1}, tile_rows, depth, left_end);
      int v = 0;
      for (; v + 2 <= panel.vectors; v += 2) {
        tile.multiply<2>(packed + v * kLanes, right_end + v * kLanes, width, sums + v * kLanes);
      }
      if (v < panel.vectors) tile.multiply<1>(packed + v * kLanes, right_end + v * kLanes, width, sums + v * kLanes);
    }
    const Timed timed(Work::results);
    for (int64_t m = begin; m < end; ++m) {
      const float* row = sums + (m - first) * width;
      for (int64_t i = 0; i < width; i += kLanes) epilogue(m, panel.column + i, load(row + i));
    }
  }
}

// As multiply_panels.
template <class Epilogue>
inline void multiply_panels_in_matrices(int64_t rows, Left left, int64_t depth, const float* packed, int64_t columns,
                                        int64_t first, int64_t last, const Epilogue& epilogue) {
  if (rows == 0) return;
  configure(MatrixShapes(std::min<int64_t>(kMatrixRows, rows)));
  const Panels panels(columns);
  for (int64_t i = first; i < last; ++i) {
    const int64_t offset = panels[i].column - panels[first].column;
    multiply_panel_in_matrices(rows, left, depth, packed + offset * depth, panels[i], epilogue);
  }
  // So that the system need not keep them when it turns to another thread.
  release();
}
