// Products of bfloat16 in the processor's matrix registers (AMX): one instruction adds 32 products to each of 16 x 16
// sums. A register holds up to 16 rows of 64 bytes; how many it has is configured for all of them at once.
// A part of path.inl.

// The registers by number: a sum for each vector of a panel, the two operands, and the same where the depth ends within
// a register.
enum MatrixRegister { kSums = 0, kLeft = kPanelVectors, kRight, kLeftEnd, kRightEnd };
constexpr int kMatrixRows = 16;

struct alignas(64) MatrixShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  void set(int which, int64_t row_count, int64_t words) {
    rows[which] = static_cast<uint8_t>(row_count);
    bytes_per_row[which] = static_cast<uint16_t>(words * sizeof(float));
  }
};

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

// sums [rows, panel] = left * packed, for one step of the depth.
template <int kFirst, int kSecond, int... kVector>
inline void multiply_step(Left left, const float* packed, int64_t width, std::integer_sequence<int, kVector...>) {
  load_matrix<kFirst>(left.data, left.row);
  ((load_matrix<kSecond>(packed + kVector * kLanes, width), multiply_matrices<kSums + kVector, kFirst, kSecond>()),
   ...);
}

// The results of one tile: [rows][vectors].
using MatrixSums = Vec[kMatrixRows * kPanelVectors];

template <int... kVector>
inline void multiply_matrix_tile(Left left, int64_t depth, const float* packed, MatrixSums& sums,
                                 std::integer_sequence<int, kVector...> vectors) {
  constexpr int64_t kWidth = sizeof...(kVector) * kLanes;
  (clear<kSums + kVector>(), ...);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes, left.data += kLanes) {
    multiply_step<kLeft, kRight>(left, packed + k * kWidth, kWidth, vectors);
  }
  if (k < depth) multiply_step<kLeftEnd, kRightEnd>(left, packed + k * kWidth, kWidth, vectors);
  (store_matrix<kSums + kVector>(reinterpret_cast<float*>(sums + kVector), kWidth), ...);
}

template <int kVectors = kPanelVectors, class Epilogue>
inline void multiply_panel_in_matrices(int64_t rows, Left left, int64_t depth, const float* packed, Panel panel,
                                       const Epilogue& epilogue) {
  if constexpr (kVectors > 1) {
    if (panel.vectors < kVectors) {
      return multiply_panel_in_matrices<kVectors - 1>(rows, left, depth, packed, panel, epilogue);
    }
  }
  const int64_t tile_rows = std::min<int64_t>(kMatrixRows, rows);
  for (int64_t begin = 0; begin < rows; begin += kMatrixRows) {
    // All tiles have as many rows, and so one configuration: the last computes some again.
    const int64_t first = std::min(begin, rows - tile_rows);
    for (int64_t m = begin; m < first + tile_rows; ++m) epilogue.prefetch(m, panel.column, kVectors * kLanes);
    MatrixSums sums;
    {
      const Timed timed(Work::products);
      multiply_matrix_tile({left.data + first * left.row, left.row, 1}, depth, packed, sums,
                           std::make_integer_sequence<int, kVectors>());
    }
    const Timed timed(Work::results);
    for (int64_t m = begin; m < first + tile_rows; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        epilogue(m, panel.column + v * kLanes, sums[(m - first) * kVectors + v]);
      }
    }
  }
}

// As multiply_panels.
template <class Epilogue>
inline void multiply_panels_in_matrices(int64_t rows, Left left, int64_t depth, const float* packed, int64_t columns,
                                        int64_t first, int64_t last, const Epilogue& epilogue) {
  if (rows == 0) return;
  const int64_t tile_rows = std::min<int64_t>(kMatrixRows, rows), end = depth % kLanes;
  MatrixShapes shapes;
  for (int v = 0; v < kPanelVectors; ++v) shapes.set(kSums + v, tile_rows, kLanes);
  shapes.set(kLeft, tile_rows, kLanes);
  shapes.set(kRight, kLanes, kLanes);
  if (end) shapes.set(kLeftEnd, tile_rows, end);
  if (end) shapes.set(kRightEnd, end, kLanes);
  configure(shapes);
  const Panels panels(columns);
  for (int64_t i = first; i < last; ++i) {
    const int64_t offset = panels[i].column - panels[first].column;
    multiply_panel_in_matrices(rows, left, depth, packed + offset * depth, panels[i], epilogue);
  }
  // So that the system need not keep them when it turns to another thread.
  release();
}
