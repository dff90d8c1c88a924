// Gradients of weights: sums over rows, by slabs of rows (see tiles.inl) in a fixed order.
// A part of path.inl.

// Words of rows of a right operand that are packed at a time: a panel of 64 kB at most, which stays in the second-level
// cache.
constexpr int64_t kWordsPerPack = 256;

// gradient [M, D] += left^T right, over the rows of one slab.
struct WeightGradient {
  float* gradient;
  int64_t M;
  const float* left;  // [words of the slab, stride], gathered by an Arithmetic
  int64_t stride;
  ConstRows right;                  // [R, D]
  const RowStatistics* statistics;  // of the slab's rows: `right` is normalized by them; null: it is taken as it is
};

// Epilogue: adds to a weight's gradient, or begins it.
struct AddToWeight {
  float* gradient;
  int64_t D;
  bool begin;

  void prefetch(int64_t m, int64_t column, int64_t columns) const {
    prefetch_lines<true>(reinterpret_cast<const char*>(gradient + m * D + column), columns * sizeof(float));
  }
  void operator()(int64_t m, int64_t column, Vec value) const {
    float* target = gradient + m * D + column;
    const int64_t count = D - column;
    Floats::store_part(target, begin ? value : value + Floats::load_part(target, count), count);
  }
};

// One panel of `depth` rows, from first_row on, normalized. `statistics` are those of these rows.
template <class Arithmetic>
inline void pack_normalized_panel(const ConstRows& source, const RowStatistics* statistics, int64_t first_row,
                                  int64_t depth, int64_t columns, Panel panel, float* wide, float* packed) {
  const int64_t width = panel.vectors * kLanes;
  with_elements(source.dtype, [&](auto elements) {
    for (int64_t k = 0; k < depth; ++k) {
      const char* row = row_of(source, first_row + k);
      prefetch_panel(source, first_row + k + kRowsAhead, panel);
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t column = panel.column + i;
        const Vec value = elements.load_part(row + column * elements.kBytes, columns - column);
        store(wide + k * width + i, statistics[k].normalized(value));
      }
    }
  });
  Arithmetic::gather(wide, depth, width, packed);
}

template <class Arithmetic>
inline void add_weight_gradient(const WeightGradient& task, int64_t D, int64_t slab_begin, int64_t rows, Panel panel,
                                float* scratch) {
  const int64_t rows_per_pack = kWordsPerPack * Arithmetic::kPerWord;
  float *packed = scratch, *wide = packed + kWordsPerPack * kPanelVectors * kLanes;
  for (int64_t begin = 0; begin < rows; begin += rows_per_pack) {
    const int64_t depth = std::min(rows_per_pack, rows - begin);
    {
      const Timed timed(Work::packing);
      if (task.statistics) {
        pack_normalized_panel<Arithmetic>(task.right, task.statistics + begin, slab_begin + begin, depth, D, panel,
                                          wide, packed);
      } else {
        Arithmetic::template pack_panel<Part::rounded>(task.right, slab_begin + begin, depth, D, panel, packed);
      }
    }
    const Left left{task.left + begin / Arithmetic::kPerWord * task.stride, 1, task.stride};
    multiply_panel<Arithmetic>(task.M, left, words<Arithmetic>(depth), packed, panel,
                               AddToWeight{task.gradient, D, slab_begin + begin == 0});
  }
}

// For the rows [slab_begin, slab_begin + rows).
template <class Arithmetic>
inline void add_weight_gradients(const std::vector<WeightGradient>& tasks, int64_t D, int64_t slab_begin, int64_t rows,
                                 ParallelFor parallel_for) {
  const Panels panels(D);
  parallel_for(panels.count() * tasks.size(), [&](int64_t first, int64_t last) {
    float* scratch = tile_scratch().reserve((1 + Arithmetic::kPerWord) * kWordsPerPack * kPanelVectors * kLanes);
    for (int64_t i = first; i < last; ++i) {
      add_weight_gradient<Arithmetic>(tasks[i / panels.count()], D, slab_begin, rows, panels[i % panels.count()],
                                      scratch);
    }
  });
}
