// Prompt diffusion on the CPU. Arithmetic is float32 whatever the tensors are.
// No include guard: each path includes it once, inside its own namespace (see path.h).

// Rows that one thread takes at a time: their scores stay in its cache, and the packed weights are read once for them.
constexpr int64_t kRowsPerTile = 16 * kTileRows;
// Backward gathers dscores of this many rows before they meet x and dout in the weight gradients. A fixed number, and
// slabs are added in order: the result does not depend on the number of threads.
constexpr int64_t kRowsPerSlab = 2048;
// Rows of x or dout that are packed at a time for the weight gradients: their panel stays in the second-level cache.
constexpr int64_t kRowsPerPack = 256;

inline float read_scalar(const ConstRows& scalar) {
  float value = 0;
  with_elements(scalar.dtype, [&](auto elements) { value = elements.load_part(scalar.data, 1)[0]; });
  return value;
}

// The raw scores of one row become relu(scores) or softmax(scores), in place; returns their maximum.
inline float activate(Activation activation, float* scores, int64_t P) {
  float best = scores[0];
  for (int64_t p = 1; p < P; ++p) best = best < scores[p] ? scores[p] : best;
  if (activation == Activation::relu) {
    // Written so that a NaN stays one.
    for (int64_t p = 0; p < P; ++p) scores[p] = scores[p] < 0 ? 0 : scores[p];
    return best < 0 ? 0 : best;
  }
  double total = 0;
  for (int64_t p = 0; p < P; p += kLanes) {
    const int64_t count = P - p;
    const Vec value = exp_nonpositive(Floats::load_part(scores + p, count) - best);
    Floats::store_part(scores + p, value, count);
    for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes); ++lane) total += value[lane];
  }
  const float scale = static_cast<float>(1 / total);
  for (int64_t p = 0; p < P; ++p) scores[p] *= scale;
  return scale;
}

// Epilogue: out = scale * (y + gate * (scores prompts)), for the rows of one tile.
template <class Y>
struct AptOutput {
  const char* y;
  char* out;
  const float* gate;
  int64_t y_stride, D;
  float scale;  // exp(log_scale)

  AptOutput(const AptForward& args, int64_t begin, float scale)
      : y(row_of(args.y, begin)),
        out(row_of(args.out, begin, args.size.D)),
        gate(args.gate + begin),
        y_stride(args.y.stride),
        D(args.size.D),
        scale(scale) {}

  void prefetch(int64_t row, int64_t column, int64_t columns) const {
    prefetch_lines<false>(y + (row * y_stride + column) * Y::kBytes, columns * Y::kBytes);
    prefetch_lines<true>(out + (row * D + column) * Y::kBytes, columns * Y::kBytes);
  }

  void operator()(int64_t row, int64_t column, Vec value) const {
    const Vec old = Y::load_part(y + (row * y_stride + column) * Y::kBytes, D - column);
    Y::store_part(out + (row * D + column) * Y::kBytes, scale * (old + gate[row] * value), D - column);
  }
};

struct AptForwardTile {
  const AptForward& args;
  const float* packed_keys;     // keys^T
  const float* packed_prompts;  // prompts
  float scale;                  // exp(log_scale)

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const int64_t D = args.size.D, P = args.size.P, stride = round_up(P, kLanes);
    float* scores = scratch;
    const FloatRows x = as_floats(args.x, begin, rows, D, scratch + kRowsPerTile * stride);
    multiply(rows, {x.data, x.stride, 1}, D, packed_keys, P, StoreFloats{scores, stride});
    for (int64_t row = 0; row < rows; ++row) {
      args.gate[begin + row] = activate(args.activation, scores + row * stride, P);
      if (args.scores) memcpy(args.scores + (begin + row) * P, scores + row * stride, P * sizeof(float));
    }
    with_elements(args.y.dtype, [&](auto elements) {
      const AptOutput<decltype(elements)> epilogue(args, begin, scale);
      multiply(rows, {scores, stride, 1}, args.size.P, packed_prompts, args.size.D, epilogue);
    });
  }
};

// Calls tile(begin, rows, scratch) for tiles that cover [begin, end); scratch holds a tile's rows [P] and [D].
template <class Tile>
inline void for_each_tile(int64_t begin, int64_t end, const AptSizes& size, ParallelFor parallel_for,
                          const Tile& tile) {
  const int64_t scratch_floats = kRowsPerTile * (round_up(size.P, kLanes) + round_up(size.D, kLanes));
  parallel_for(round_up(end - begin, kRowsPerTile) / kRowsPerTile, [&](int64_t first, int64_t last) {
    float* scratch = tile_scratch().reserve(scratch_floats);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = begin + i * kRowsPerTile;
      tile(row, std::min(kRowsPerTile, end - row), scratch);
    }
    tile_scratch().release_excess();
  });
}

inline void apt_forward(const AptForward& args, ParallelFor parallel_for) {
  const auto [R, D, P] = args.size;
  const int64_t keys_floats = D * round_up(P, kLanes), prompts_floats = P * round_up(D, kLanes);
  float* packed_keys = call_scratch().reserve(keys_floats + prompts_floats);
  float* packed_prompts = packed_keys + keys_floats;
  pack_transposed(args.keys, D, P, packed_keys);
  pack(args.prompts, P, D, packed_prompts);
  const float scale = std::exp(read_scalar(args.log_scale));
  for_each_tile(0, R, args.size, parallel_for, AptForwardTile{args, packed_keys, packed_prompts, scale});
  call_scratch().release_excess();
}

// Epilogue: target [rows, D] in the type of its elements.
template <class Target>
struct StoreRows {
  char* target;
  int64_t D;

  void prefetch(int64_t row, int64_t column, int64_t columns) const {
    prefetch_lines<true>(target + (row * D + column) * Target::kBytes, columns * Target::kBytes);
  }
  void operator()(int64_t row, int64_t column, Vec value) const {
    Target::store_part(target + (row * D + column) * Target::kBytes, value, D - column);
  }
};

// From dout to dscores, dx, dy and the rows' shares of dlog_scale, for a tile of one slab.
struct AptBackwardTile {
  const AptBackward& args;
  const float* packed_prompts;  // prompts^T
  const float* packed_keys;     // keys
  float scale;                  // exp(log_scale)
  int64_t slab_begin;
  float* dscores;      // [slab, P padded]
  double* dlog_scale;  // [slab]

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const int64_t D = args.size.D, P = args.size.P, stride = round_up(P, kLanes);
    float* products = scratch;  // dout prompts^T
    const FloatRows dout = as_floats(args.dout, begin, rows, D, scratch + kRowsPerTile * stride);
    multiply(rows, {dout.data, dout.stride, 1}, D, packed_prompts, P, StoreFloats{products, stride});
    float* tile_dscores = dscores + (begin - slab_begin) * stride;
    double* shares = dlog_scale + begin - slab_begin;
    for (int64_t row = 0; row < rows; ++row) {
      shares[row] = score_gradients(begin + row, products + row * stride, tile_dscores + row * stride);
    }
    if (args.dlog_scale) add_y_shares(begin, rows, dout, shares);
    if (args.dy.data) scale_gradient(begin, rows, dout);
    if (args.dx.data) {
      with_elements(args.dx.dtype, [&](auto elements) {
        const StoreRows<decltype(elements)> epilogue{row_of(args.dx, begin, args.size.D), args.size.D};
        multiply(rows, {tile_dscores, stride, 1}, args.size.P, packed_keys, args.size.D, epilogue);
      });
    }
  }

  // dscores of one row from its products with the prompts; returns sum(dout * (out - scale * y)).
  double score_gradients(int64_t row, const float* products, float* dscores_row) const {
    const int64_t P = args.size.P;
    const float* scores = args.scores + row * P;
    Vec sums = {};
    for (int64_t p = 0; p < P; p += kLanes) sums += Floats::load_part(scores + p, P - p) * load(products + p);
    const double weighted = sum_lanes(sums);
    const float factor = scale * args.gate[row], mean = static_cast<float>(weighted);
    const bool relu = args.activation == Activation::relu;
    for (int64_t p = 0; p < P; p += kLanes) {
      const Vec score = Floats::load_part(scores + p, P - p), product = load(products + p);
      // A comparison written so that the gradient at a NaN is NaN, not zero.
      store(dscores_row + p, factor * (relu ? (score <= 0.0f ? Vec{} : product) : score * (product - mean)));
    }
    return factor * weighted;
  }

  // shares[row] += scale * sum(dout * y)
  void add_y_shares(int64_t begin, int64_t rows, FloatRows dout, double* shares) const {
    const int64_t D = args.size.D;
    with_elements(args.y.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* y = row_of(args.y, begin + row);
        const float* gradient = dout.data + row * dout.stride;
        Vec sums = {};
        for (int64_t d = 0; d < D; d += kLanes) {
          sums += Floats::load_part(gradient + d, D - d) * elements.load_part(y + d * elements.kBytes, D - d);
        }
        shares[row] += scale * sum_lanes(sums);
      }
    });
  }

  // dy = scale * dout
  void scale_gradient(int64_t begin, int64_t rows, FloatRows dout) const {
    const int64_t D = args.size.D;
    with_elements(args.dy.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        char* dy = row_of(args.dy, begin + row, D);
        const float* gradient = dout.data + row * dout.stride;
        for (int64_t d = 0; d < D; d += kLanes) {
          elements.store_part(dy + d * elements.kBytes, scale * Floats::load_part(gradient + d, D - d), D - d);
        }
      }
    });
  }
};

// gradient [P, D] += left right over the rows of one slab, where right's rows may have factors.
struct WeightGradient {
  float* gradient;
  Left left;               // [P, slab]
  const ConstRows& right;  // [R, D]
  const float* factors;    // [slab], or null
};

// Epilogue: adds to a weight's gradient, or begins it.
struct AddToWeight {
  float* gradient;
  int64_t D;
  bool begin;

  void prefetch(int64_t p, int64_t column, int64_t columns) const {
    prefetch_lines<true>(reinterpret_cast<const char*>(gradient + p * D + column), columns * sizeof(float));
  }
  void operator()(int64_t p, int64_t column, Vec value) const {
    float* target = gradient + p * D + column;
    const int64_t count = D - column;
    Floats::store_part(target, begin ? value : value + Floats::load_part(target, count), count);
  }
};

inline void add_weight_gradient(const WeightGradient& task, const AptSizes& size, int64_t slab_begin, int64_t rows,
                                Panel panel, float* packed) {
  for (int64_t begin = 0; begin < rows; begin += kRowsPerPack) {
    const int64_t depth = std::min(kRowsPerPack, rows - begin);
    const float* factors = task.factors ? task.factors + begin : nullptr;
    pack_panel(task.right, slab_begin + begin, depth, size.D, panel, factors, packed);
    const Left left{task.left.data + begin * task.left.step, task.left.row, task.left.step};
    multiply_panel(size.P, left, depth, packed, panel, AddToWeight{task.gradient, size.D, slab_begin + begin == 0});
  }
}

inline void add_weight_gradients(const std::vector<WeightGradient>& tasks, const AptSizes& size, int64_t slab_begin,
                                 int64_t rows, ParallelFor parallel_for) {
  const Panels panels(size.D);
  parallel_for(panels.count() * tasks.size(), [&](int64_t first, int64_t last) {
    float* packed = tile_scratch().reserve(kRowsPerPack * kPanelVectors * kLanes);
    for (int64_t i = first; i < last; ++i) {
      add_weight_gradient(tasks[i / panels.count()], size, slab_begin, rows, panels[i % panels.count()], packed);
    }
  });
}

inline void apt_backward(const AptBackward& args, ParallelFor parallel_for) {
  const auto [R, D, P] = args.size;
  const int64_t stride = round_up(P, kLanes), slab_rows = std::min(R, kRowsPerSlab);
  const int64_t prompts_floats = D * stride, keys_floats = P * round_up(D, kLanes);
  // The packed weights and dscores are read by vectors and come first, for their alignment.
  float* packed_prompts = call_scratch().reserve(prompts_floats + keys_floats + slab_rows * (stride + 3) + 1);
  float* packed_keys = packed_prompts + prompts_floats;
  float* dscores = packed_keys + keys_floats;
  double* row_dlog_scale = reinterpret_cast<double*>(dscores + slab_rows * stride);
  float* factors = reinterpret_cast<float*>(row_dlog_scale + slab_rows);
  pack_transposed(args.prompts, D, P, packed_prompts);
  if (args.dx.data) pack(args.keys, P, D, packed_keys);
  const float scale = std::exp(read_scalar(args.log_scale));
  if (args.dkeys) std::fill_n(args.dkeys, R ? 0 : P * D, 0.0f);
  if (args.dprompts) std::fill_n(args.dprompts, R ? 0 : P * D, 0.0f);
  double dlog_scale = 0;
  for (int64_t begin = 0; begin < R; begin += kRowsPerSlab) {
    const int64_t rows = std::min(kRowsPerSlab, R - begin);
    const AptBackwardTile tile{args, packed_prompts, packed_keys, scale, begin, dscores, row_dlog_scale};
    for_each_tile(begin, begin + rows, args.size, parallel_for, tile);
    dlog_scale = std::accumulate(row_dlog_scale, row_dlog_scale + rows, dlog_scale);
    for (int64_t row = 0; row < rows; ++row) factors[row] = scale * args.gate[begin + row];
    std::vector<WeightGradient> tasks;
    if (args.dkeys) tasks.push_back({args.dkeys, {dscores, 1, stride}, args.x, nullptr});
    if (args.dprompts) tasks.push_back({args.dprompts, {args.scores + begin * P, 1, P}, args.dout, factors});
    add_weight_gradients(tasks, args.size, begin, rows, parallel_for);
  }
  if (args.dlog_scale) *args.dlog_scale = static_cast<float>(dlog_scale);
  call_scratch().release_excess();
}
