// Prompt diffusion on the CPU. Arithmetic is float32 whatever the tensors are.
// No include guard: each path includes it once, inside its own namespace (see avx512.cpp).

// Rows that one thread takes at a time: their scores stay in its cache, and the packed weights are read once for them.
constexpr int64_t kRowsPerTile = 16 * kTileRows;
// Backward gathers dscores of this many rows before they meet x and dout in the weight gradients. A fixed number, and
// slabs are added in order: the result does not depend on the number of threads.
constexpr int64_t kRowsPerSlab = 2048;
// Rows of x or dout that are packed at a time for the weight gradients: their panel stays in the second-level cache.
constexpr int64_t kRowsPerPack = 256;

inline float read_scalar(const ConstRows& scalar) { return load_part(scalar.dtype, scalar.data, 1)[0]; }

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
    const Vec value = exp_nonpositive(load_part(DType::float32, scores + p, count) - best);
    store_part(DType::float32, scores + p, value, count);
    for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes); ++lane) total += value[lane];
  }
  const float scale = static_cast<float>(1 / total);
  for (int64_t p = 0; p < P; ++p) scores[p] *= scale;
  return scale;
}

struct AptForwardTile {
  const AptForward& args;
  const float* packed_keys;     // keys^T
  const float* packed_prompts;  // prompts
  float scale;                  // exp(log_scale)

  static int64_t scratch_floats(const AptSizes& size) {
    return kRowsPerTile * (round_up(size.D, kLanes) + round_up(size.P, kLanes));
  }

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const auto [R, D, P] = args.size;
    const int64_t stride = round_up(P, kLanes);
    float* scores = scratch;
    const FloatRows x = as_floats(args.x, begin, rows, D, scratch + kRowsPerTile * stride);
    multiply(rows, {x.data, x.stride, 1}, D, packed_keys, Panels(P),
             [&](int64_t row, int64_t column, Vec value) { store(scores + row * stride + column, value); });
    for (int64_t row = 0; row < rows; ++row) {
      args.gate[begin + row] = activate(args.activation, scores + row * stride, P);
      if (args.scores) memcpy(args.scores + (begin + row) * P, scores + row * stride, P * sizeof(float));
    }
    const int64_t width = D;  // a structured binding cannot be captured in C++17
    multiply(rows, {scores, stride, 1}, P, packed_prompts, Panels(D), [&](int64_t row, int64_t column, Vec value) {
      const int64_t offset = column * size_of(args.y.dtype), count = width - column;
      const Vec y = load_part(args.y.dtype, row_of(args.y, begin + row) + offset, count);
      store_part(args.out.dtype, row_of(args.out, begin + row, width) + offset,
                 scale * (y + args.gate[begin + row] * value), count);
    });
  }
};

// Calls tile(begin, rows, scratch) for tiles that cover [begin, end).
template <class Tile>
inline void for_each_tile(int64_t begin, int64_t end, int64_t scratch_floats, ParallelFor parallel_for,
                          const Tile& tile) {
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
  const int64_t keys_floats = D * Panels(P).padded_columns();
  float* packed_keys = call_scratch().reserve(keys_floats + P * Panels(D).padded_columns());
  float* packed_prompts = packed_keys + keys_floats;
  pack_transposed(args.keys, D, P, packed_keys);
  pack(args.prompts, P, D, packed_prompts);
  const AptForwardTile tile{args, packed_keys, packed_prompts, std::exp(read_scalar(args.log_scale))};
  for_each_tile(0, R, AptForwardTile::scratch_floats(args.size), parallel_for, tile);
  call_scratch().release_excess();
}

// From dout to dscores, dx, dy and the rows' shares of dlog_scale, for the rows of one slab.
struct AptBackwardTile {
  const AptBackward& args;
  const float* packed_prompts;  // prompts^T
  const float* packed_keys;     // keys
  float scale;                  // exp(log_scale)
  int64_t slab_begin;
  float* dscores;     // [slab, P padded]
  double* dlog_scale;  // [slab]

  static int64_t scratch_floats(const AptSizes& size) {
    return kRowsPerTile * (round_up(size.D, kLanes) + round_up(size.P, kLanes));
  }

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const auto [R, D, P] = args.size;
    const int64_t stride = round_up(P, kLanes);
    float* products = scratch;  // dout prompts^T
    const FloatRows dout = as_floats(args.dout, begin, rows, D, scratch + kRowsPerTile * stride);
    multiply(rows, {dout.data, dout.stride, 1}, D, packed_prompts, Panels(P),
             [&](int64_t row, int64_t column, Vec value) { store(products + row * stride + column, value); });
    float* slab_dscores = dscores + (begin - slab_begin) * stride;
    for (int64_t row = 0; row < rows; ++row) {
      const double share = score_gradients(begin + row, products + row * stride, slab_dscores + row * stride);
      if (args.dlog_scale) {
        dlog_scale[begin + row - slab_begin] = share + scale * dot_with_y(begin + row, dout.data + row * dout.stride);
      }
    }
    const int64_t width = D;
    if (args.dx.data) {
      multiply(rows, {slab_dscores, stride, 1}, P, packed_keys, Panels(D), [&](int64_t row, int64_t column, Vec value) {
        store_part(args.dx.dtype, row_of(args.dx, begin + row, width) + column * size_of(args.dx.dtype), value,
                   width - column);
      });
    }
    if (args.dy.data) {
      for (int64_t row = 0; row < rows; ++row) scale_row(begin + row, dout.data + row * dout.stride);
    }
  }

  // dscores of one row from its products with the prompts; returns sum(dout * (out - scale * y)).
  double score_gradients(int64_t row, const float* products, float* dscores_row) const {
    const int64_t P = args.size.P;
    const float* scores = args.scores + row * P;
    const float factor = scale * args.gate[row];
    double weighted = 0;
    for (int64_t p = 0; p < P; p += kLanes) {
      weighted += sum_lanes(load_part(DType::float32, scores + p, P - p) *
                            load_part(DType::float32, products + p, P - p));
    }
    const bool relu = args.activation == Activation::relu;
    const float mean = static_cast<float>(weighted);
    for (int64_t p = 0; p < P; p += kLanes) {
      const Vec score = load_part(DType::float32, scores + p, P - p);
      const Vec product = load_part(DType::float32, products + p, P - p);
      // A comparison written so that the gradient at a NaN is NaN, not zero.
      store(dscores_row + p, factor * (relu ? (score <= 0.0f ? Vec{} : product) : score * (product - mean)));
    }
    return factor * weighted;
  }

  double dot_with_y(int64_t row, const float* dout_row) const {
    const char* y = row_of(args.y, row);
    double total = 0;
    for (int64_t d = 0; d < args.size.D; d += kLanes) {
      const int64_t count = args.size.D - d;
      total += sum_lanes(load_part(args.y.dtype, y + d * size_of(args.y.dtype), count) *
                         load_part(DType::float32, dout_row + d, count));
    }
    return total;
  }

  void scale_row(int64_t row, const float* dout_row) const {
    char* dy = row_of(args.dy, row, args.size.D);
    for (int64_t d = 0; d < args.size.D; d += kLanes) {
      const int64_t count = args.size.D - d;
      store_part(args.dy.dtype, dy + d * size_of(args.dy.dtype), scale * load_part(DType::float32, dout_row + d, count),
                 count);
    }
  }
};

// gradient [P, D] (+)= left^T right over the rows of one slab, where right's rows may have factors.
struct WeightGradient {
  float* gradient;
  Left left;             // [P, slab]
  const ConstRows& right;  // [R, D]
  const float* factors;  // [slab], or null
};

inline void add_weight_gradient(const WeightGradient& task, const AptSizes& size, int64_t slab_begin, int64_t rows,
                                Panel panel, float* packed) {
  for (int64_t begin = 0; begin < rows; begin += kRowsPerPack) {
    const int64_t depth = std::min(kRowsPerPack, rows - begin);
    pack_panel(task.right, slab_begin + begin, depth, size.D, panel, task.factors ? task.factors + begin : nullptr,
               packed);
    const Left left{task.left.data + begin * task.left.step, task.left.row, task.left.step};
    const bool first = slab_begin + begin == 0;
    multiply_panel(size.P, left, depth, packed, panel, [&](int64_t p, int64_t column, Vec value) {
      float* target = task.gradient + p * size.D + column;
      const int64_t count = size.D - column;
      store_part(DType::float32, target, first ? value : value + load_part(DType::float32, target, count), count);
    });
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
  const int64_t prompts_floats = D * stride, keys_floats = P * Panels(D).padded_columns();
  // The doubles come first, for their alignment.
  double* row_dlog_scale =
      reinterpret_cast<double*>(call_scratch().reserve(slab_rows * (3 + stride) + prompts_floats + keys_floats));
  float* factors = reinterpret_cast<float*>(row_dlog_scale + slab_rows);
  float* dscores = factors + slab_rows;
  float* packed_prompts = dscores + slab_rows * stride;
  float* packed_keys = packed_prompts + prompts_floats;
  pack_transposed(args.prompts, D, P, packed_prompts);
  if (args.dx.data) pack(args.keys, P, D, packed_keys);
  const float scale = std::exp(read_scalar(args.log_scale));
  double dlog_scale = 0;
  for (int64_t begin = 0; begin < R; begin += kRowsPerSlab) {
    const int64_t rows = std::min(kRowsPerSlab, R - begin);
    const AptBackwardTile tile{args, packed_prompts, packed_keys, scale, begin, dscores, row_dlog_scale};
    for_each_tile(begin, begin + rows, AptBackwardTile::scratch_floats(args.size), parallel_for, tile);
    if (args.dlog_scale) dlog_scale = std::accumulate(row_dlog_scale, row_dlog_scale + rows, dlog_scale);
    std::vector<WeightGradient> tasks;
    if (args.dkeys) tasks.push_back({args.dkeys, {dscores, 1, stride}, args.x, nullptr});
    if (args.dprompts) {
      for (int64_t row = 0; row < rows; ++row) factors[row] = scale * args.gate[begin + row];
      tasks.push_back({args.dprompts, {args.scores + begin * P, 1, P}, args.dout, factors});
    }
    add_weight_gradients(tasks, args.size, begin, rows, parallel_for);
  }
  if (args.dlog_scale) *args.dlog_scale = static_cast<float>(dlog_scale);
  call_scratch().release_excess();
}
