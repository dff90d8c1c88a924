// Gradients of weights: sums over rows, by slabs of rows (see tiles.inl) in a fixed order.
// A part of path.inl.

// Words of rows of a right operand, and panels of it, that are packed at a time: of 64 kB each, they stay in the
// second-level cache.
constexpr int64_t kWordsPerPack = 256, kPanelsPerPack = 2;

// What meets the rows of one slab in weights' gradients, filled in from tile to tile: a left operand, transposed, whose
// depth runs over the rows.
template <class Arithmetic>
class Gathered {
 public:
  // Of values in rows of `stride`, whole vectors.
  Gathered(float* data, int64_t stride, int64_t slab_rows)
      : data_(data), stride_(stride), depth_(depth_of(slab_rows)) {}
  static int64_t floats(int64_t stride, int64_t slab_rows) { return stride * depth_of(slab_rows); }

  Left left() const { return Arithmetic::kInMatrices ? Left{data_, depth_, 1} : Left{data_, 1, stride_}; }

  // words_of(row, column) is a vector of words that begin with this row, of those [first, first + rows) of the slab,
  // counted from `first`.
  template <class WordsOf>
  void fill_with(int64_t first, int64_t rows, const WordsOf& words_of) const {
    const Timed timed(Work::conversions);
    constexpr int kPerWord = Arithmetic::kPerWord;
    if constexpr (Arithmetic::kInMatrices) {
      for (int64_t column = 0; column < stride_; column += kLanes) {
        for (int64_t row = 0; row < rows; row += kLanes * kPerWord) {
          Vec square[kLanes] = {};
          for (int i = 0; i < kLanes && row + i * kPerWord < rows; ++i)
            square[i] = words_of(row + i * kPerWord, column);
          transpose(square);
          float* target = data_ + column * depth_ + (first + row) / kPerWord;
          for (int i = 0; i < kLanes; ++i) store(target + i * depth_, square[i]);
        }
      }
    } else {
      float* target = data_ + first / kPerWord * stride_;
      for (int64_t row = 0; row < rows; row += kPerWord, target += stride_) {
        for (int64_t column = 0; column < stride_; column += kLanes) store(target + column, words_of(row, column));
      }
    }
  }

  // values [rows, stride]
  void fill(int64_t first, int64_t rows, const float* values) const {
    fill_with(first, rows, [&](int64_t row, int64_t column) {
      return Arithmetic::words_of_rows(values, row, rows, stride_, column);
    });
  }

 private:
  // Of a row of the operand, in words: an odd number of cache lines, as in spread_width, and whole squares of a tile.
  static int64_t depth_of(int64_t slab_rows) {
    return Arithmetic::kInMatrices ? spread_width(words<Arithmetic>(slab_rows)) : words<Arithmetic>(slab_rows);
  }

  float* data_;
  int64_t stride_, depth_;
};

// gradient [M, D] += left^T right, over the rows of one slab.
struct WeightGradient {
  float* gradient;
  int64_t M;
  Left left;                        // of the slab's rows; see Gathered
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

// As pack_panels, of floats that are normalized. `statistics` are those of these rows.
inline void pack_normalized_panels(const ConstRows& source, const RowStatistics* statistics, int64_t first_row,
                                   int64_t depth, int64_t columns, int64_t first, int64_t last, float* packed) {
  pack_panels<FloatArithmetic>(source, first_row, depth, columns, first, last, packed);
  const Timed timed(Work::packing);
  const Panels panels(columns);
  for (int64_t i = first; i < last; ++i) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int v = 0; v < panels[i].vectors; ++v, packed += kLanes)
        store(packed, statistics[k].normalized(load(packed)));
    }
  }
}

// Panels [first, last) of one gradient.
template <class Arithmetic>
inline void add_weight_gradient(const WeightGradient& task, int64_t D, int64_t slab_begin, int64_t rows, int64_t first,
                                int64_t last, float* packed) {
  const int64_t rows_per_pack = kWordsPerPack * Arithmetic::kPerWord;
  for (int64_t begin = 0; begin < rows; begin += rows_per_pack) {
    const int64_t depth = std::min(rows_per_pack, rows - begin), first_row = slab_begin + begin;
    if (task.statistics) {
      pack_normalized_panels(task.right, task.statistics + begin, first_row, depth, D, first, last, packed);
    } else {
      pack_panels<Arithmetic>(task.right, first_row, depth, D, first, last, packed);
    }
    const Left left{task.left.data + begin / Arithmetic::kPerWord * task.left.step, task.left.row, task.left.step};
    multiply_panels<Arithmetic>(task.M, left, words<Arithmetic>(depth), packed, D, first, last,
                                AddToWeight{task.gradient, D, first_row == 0});
  }
}

// For the rows [slab_begin, slab_begin + rows).
template <class Arithmetic>
inline void add_weight_gradients(const std::vector<WeightGradient>& tasks, int64_t D, int64_t slab_begin, int64_t rows,
                                 ParallelFor parallel_for) {
  const int64_t count = Panels(D).count();
  parallel_for(count * tasks.size(), [&](int64_t first, int64_t last) {
    float* packed = tile_scratch().reserve(kPanelsPerPack * kWordsPerPack * kPanelVectors * kLanes);
    while (first < last) {
      const int64_t panel = first % count, panels = std::min({kPanelsPerPack, count - panel, last - first});
      add_weight_gradient<Arithmetic>(tasks[first / count], D, slab_begin, rows, panel, panel + panels, packed);
      first += panels;
    }
  });
}
