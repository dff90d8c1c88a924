// Prompt diffusion on the CPU. Whatever the tensors are, arithmetic is float32; only where the processor multiplies
// bfloat16 itself, and x is bfloat16 or to be rounded to it, the factors of products are bfloat16 and their sums
// float32. A part of path.inl.

// Of so many bytes of floats, none of them a NaN.
template <int kBytes>
inline float greatest_by_halves(const void* values) {
  if constexpr (kBytes == sizeof(float)) {
    return read<float>(values);
  } else {
    using Half = typename FloatsOf<kBytes / 2>::Type;
    const Half first = read<Half>(values), second = read<Half>(static_cast<const char*>(values) + kBytes / 2);
    const Half greater = first > second ? first : second;
    return greatest_by_halves<kBytes / 2>(&greater);
  }
}

// A NaN is greater than all others.
inline float greatest(const float* scores, int64_t P) {
  Vec best = Vec{} - INFINITY;
  IntVec is_nan = {};
  float last = -INFINITY;
  int64_t p = 0;
  for (; p + kLanes <= P; p += kLanes) {
    const Vec score = load(scores + p);
    best = score > best ? score : best;
    is_nan |= score != score;
  }
  for (; p < P; ++p) last = scores[p] > last || scores[p] != scores[p] ? scores[p] : last;
  if (last != last || lanes_where(is_nan)) return NAN;
  return std::max(greatest_by_halves<PETL_VECTOR_BYTES>(&best), last);
}

// The raw scores of one row become relu(scores) or softmax(scores), in place; returns their maximum.
inline float activate(Activation activation, float* scores, int64_t P) {
  const float best = greatest(scores, P);
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

// The width of a row of scores in working memory, whatever a word holds: the columns beyond P stay zero. No narrower
// than AptSizes::kept.
template <class Arithmetic>
inline int64_t scores_stride(int64_t P) {
  return round_up(P, std::max<int64_t>(8, Arithmetic::kPerWord * kLanes));
}

inline void keep_scores(const float* scores, int64_t width, char* kept, DType dtype) {
  with_elements(dtype, [&](auto elements) {
    for (int64_t p = 0; p < width; p += kLanes) {
      elements.store_part(kept + p * elements.kBytes, Floats::load_part(scores + p, width - p), width - p);
    }
  });
}

template <class Arithmetic>
struct AptForwardTile {
  const AptForward& args;
  const float* packed_keys;            // keys^T
  const float* packed_prompts;         // prompts
  const ExactSums<Arithmetic>* exact;  // null where the keys are not rounded, or no mask hangs on them
  float scale;                         // exp(log_scale)

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const int64_t D = args.size.D, P = args.size.P, stride = scores_stride<Arithmetic>(P);
    float *factors = scratch, *scores = factors + factors_width(P), *wide = scores + kRowsPerTile * stride;
    const Left x = Arithmetic::rows_as_left(args.x, begin, rows, D, wide);
    multiply<Arithmetic>(rows, x, words<Arithmetic>(D), packed_keys, P, StoreFloats{scores, stride});
    finish_scores(begin, rows, x, scores, factors);
    const Left left = Arithmetic::values_as_left(scores, rows, stride);
    with_elements(args.y.dtype, [&](auto elements) {
      const AptOutput<decltype(elements)> epilogue(args, begin, scale);
      multiply<Arithmetic>(rows, left, words<Arithmetic>(args.size.P), packed_prompts, args.size.D, epilogue);
    });
  }

  // The products x keys^T become scores. `factors` is working memory.
  void finish_scores(int64_t begin, int64_t rows, const Left& x, float* scores, float* factors) const {
    const Timed timed(Work::activations);
    const int64_t P = args.size.P, stride = scores_stride<Arithmetic>(P);
    for (int64_t row = 0; row < rows; ++row) {
      float* row_scores = scores + row * stride;
      std::fill(row_scores + P, row_scores + stride, 0.0f);
      if (exact) exact->correct(x.data + row * x.row, nullptr, nullptr, row_scores);
      args.gate[begin + row] = activate(args.activation, row_scores, P);
      if (args.scores.data) {
        const int64_t kept = args.size.kept();
        keep_scores(row_scores, kept, row_of(args.scores, begin + row, kept), args.scores.dtype);
      }
      if (args.dropout.seeds) {
        keep_factors(args.dropout, begin + row, P, factors);
        multiply_by(factors, P, row_scores);
        args.gate[begin + row] = greatest(row_scores, P);
      }
    }
  }
};

template <class Arithmetic>
struct AptForwardMemory {
  float *keys, *prompts;  // packed, the keys transposed
  float* rounding;        // of ExactSums

  AptForwardMemory(const AptSizes& size, Partition& partition)
      : keys(partition.take(words<Arithmetic>(size.D) * scores_stride<Arithmetic>(size.P))),
        prompts(partition.take(words<Arithmetic>(size.P) * round_up(size.D, kLanes))),
        rounding(partition.take(round_up(size.P, kLanes))) {}
};

template <class Arithmetic>
inline void apt_forward_by(const AptForward& args, ParallelFor parallel_for) {
  const auto [R, D, P] = args.size;
  const int64_t stride = scores_stride<Arithmetic>(P), width = round_up(D, kLanes);
  const bool is_exact = Arithmetic::rounds(args.keys.dtype) && args.activation == Activation::relu;
  const auto memory = parts_of<AptForwardMemory<Arithmetic>>(call_scratch(), args.size);
  pack_transposed<Arithmetic>(args.keys, D, P, memory.keys);
  pack<Arithmetic>(args.prompts, P, D, memory.prompts);
  std::optional<ExactSums<Arithmetic>> exact;
  if (is_exact) exact.emplace(args.keys, nullptr, P, D, memory.rounding);
  const AptForwardTile<Arithmetic> tile{args, memory.keys, memory.prompts, exact ? &*exact : nullptr,
                                        std::exp(read_scalar(args.log_scale))};
  for_each_tile(0, R, factors_width(P) + kRowsPerTile * (stride + width), parallel_for, tile);
  call_scratch().release_excess();
}

// What backward keeps of one slab of rows until all its tiles are done.
template <class Arithmetic>
struct AptSlab {
  int64_t begin;
  Gathered<Arithmetic> dscores;   // the left operand of dkeys
  Gathered<Arithmetic> weighted;  // the left operand of dprompts: exp(log_scale) * gate * scores
  double* dlog_scale;             // [rows], each row's share
};

// A packed right operand, and what its rounding left out; null where that is nothing or is not worth a product.
struct PackedParts {
  float* rounded;
  float* rest;
};

// From dout to dscores, dx, dy and the rows' shares of dlog_scale, for a tile of one slab.
template <class Arithmetic>
struct AptBackwardTile {
  const AptBackward& args;
  PackedParts prompts;  // prompts^T
  PackedParts keys;     // keys
  float scale;          // exp(log_scale)
  AptSlab<Arithmetic> slab;

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const int64_t D = args.size.D, P = args.size.P, stride = scores_stride<Arithmetic>(P), depth = words<Arithmetic>(D);
    float *factors = scratch, *dscores = factors + factors_width(P), *weighted = dscores + kRowsPerTile * stride;
    float* wide = weighted + kRowsPerTile * stride;
    const Left dout = Arithmetic::rows_as_left(args.dout, begin, rows, D, wide);
    multiply<Arithmetic>(rows, dout, depth, prompts.rounded, P, StoreFloats{dscores, stride});
    if (prompts.rest) multiply<Arithmetic>(rows, dout, depth, prompts.rest, P, AddFloats{dscores, stride});
    double* shares = slab.dlog_scale + begin - slab.begin;
    for (int64_t row = 0; row < rows; ++row) {
      const Timed timed(Work::activations);
      shares[row] = score_gradients(begin + row, dscores + row * stride, weighted + row * stride, factors);
    }
    slab.dscores.fill(begin - slab.begin, rows, dscores);
    slab.weighted.fill(begin - slab.begin, rows, weighted);
    if (args.dlog_scale) add_y_shares(begin, rows, shares);
    if (args.dy.data) scale_gradient(begin, rows);
    if (args.dx.data) input_gradient(begin, rows, Arithmetic::values_as_left(dscores, rows, stride), wide);
  }

  // dx = dscores keys; `wide` [rows, D in whole vectors] is free by now.
  void input_gradient(int64_t begin, int64_t rows, Left dscores, float* wide) const {
    const int64_t D = args.size.D, depth = words<Arithmetic>(args.size.P);
    if (keys.rest) multiply<Arithmetic>(rows, dscores, depth, keys.rest, D, StoreFloats{wide, round_up(D, kLanes)});
    with_elements(args.dx.dtype, [&](auto elements) {
      const StoreRows<decltype(elements)> epilogue{row_of(args.dx, begin, D), D, keys.rest ? wide : nullptr};
      multiply<Arithmetic>(rows, dscores, depth, keys.rounded, D, epilogue);
    });
  }

  // For one row: its products with the prompts become dscores, in place, and `weighted` exp(log_scale) * gate * scores.
  // `factors` is working memory. Returns sum(dout * (out - exp(log_scale) * y)).
  double score_gradients(int64_t row, float* products, float* weighted, float* factors) const {
    const int64_t P = args.size.P, stride = scores_stride<Arithmetic>(P);
    const float factor = scale * args.gate[row];
    std::fill(products + P, products + stride, 0.0f);
    std::fill(weighted + P, weighted + stride, 0.0f);
    with_elements(args.scores.dtype, [&](auto elements) {
      const char* scores = row_of(args.scores, row);
      for (int64_t p = 0; p < P; p += kLanes) {
        Floats::store_part(weighted + p, elements.load_part(scores + p * elements.kBytes, P - p), P - p);
      }
    });
    if (args.dropout.seeds) {
      keep_factors(args.dropout, row, P, factors);
      multiply_by(factors, P, products);
    }
    Vec sums = {};
    for (int64_t p = 0; p < stride; p += kLanes) sums += load(weighted + p) * load(products + p);
    const double total = sum_lanes(sums);
    const float mean = static_cast<float>(total);
    const bool relu = args.activation == Activation::relu;
    for (int64_t p = 0; p < stride; p += kLanes) {
      const Vec score = load(weighted + p), product = load(products + p);
      // A comparison written so that the gradient at a NaN is NaN, not zero.
      store(products + p, factor * (relu ? (score <= 0.0f ? Vec{} : product) : score * (product - mean)));
      store(weighted + p, factor * score);
    }
    if (args.dropout.seeds) multiply_by(factors, P, weighted);
    return factor * total;
  }

  // shares[row] += exp(log_scale) * sum(dout * y)
  void add_y_shares(int64_t begin, int64_t rows, double* shares) const {
    const Timed timed(Work::column_sums);
    const int64_t D = args.size.D;
    with_elements(args.y.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        const char *y = row_of(args.y, begin + row), *dout = row_of(args.dout, begin + row);
        Vec sums = {};
        for (int64_t d = 0; d < D; d += kLanes) {
          sums += elements.load_part(dout + d * elements.kBytes, D - d) *
                  elements.load_part(y + d * elements.kBytes, D - d);
        }
        shares[row] += scale * sum_lanes(sums);
      }
    });
  }

  // dy = exp(log_scale) * dout
  void scale_gradient(int64_t begin, int64_t rows) const {
    const Timed timed(Work::results);
    const int64_t D = args.size.D;
    with_elements(args.dy.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* dout = row_of(args.dout, begin + row);
        char* dy = row_of(args.dy, begin + row, D);
        for (int64_t d = 0; d < D * elements.kBytes; d += kLanes * elements.kBytes) {
          const int64_t count = D - d / elements.kBytes;
          elements.store_part(dy + d, scale * elements.load_part(dout + d, count), count);
        }
      }
    });
  }
};

// Where weights in float32 meet activations in bfloat16, the error of dx is at least 10 times smaller than eager's,
// whose masks are those of rounded keys. For that some products see the weights whole, in two parts: those of the
// prompts where there are few of them or dx is rounded too, and those of the keys where both are so. It is then 11 to
// 15 times smaller.
constexpr int64_t kManyPrompts = 128;

template <class Arithmetic>
struct AptBackwardMemory {
  PackedParts prompts, keys;
  float *dscores, *weighted;  // of AptSlab
  double* dlog_scale;

  AptBackwardMemory(const AptBackward& args, Partition& partition) {
    const auto [R, D, P] = args.size;
    const int64_t stride = scores_stride<Arithmetic>(P);
    const int64_t prompts_floats = words<Arithmetic>(D) * stride;
    const int64_t keys_floats = words<Arithmetic>(P) * round_up(D, kLanes);
    const int64_t slab_rows = std::min(R, kRowsPerSlab), gathered = Gathered<Arithmetic>::floats(stride, slab_rows);
    const bool is_rounded = Arithmetic::rounds(args.prompts.dtype);
    const bool are_few = P < kManyPrompts, dx_is_rounded = args.dx.dtype == DType::bfloat16;
    const bool prompts_in_parts = is_rounded && (are_few || dx_is_rounded);
    const bool keys_in_parts = is_rounded && are_few && dx_is_rounded;
    prompts.rounded = partition.take(prompts_floats);
    prompts.rest = prompts_in_parts ? partition.take(prompts_floats) : nullptr;
    keys.rounded = partition.take(keys_floats);
    keys.rest = keys_in_parts ? partition.take(keys_floats) : nullptr;
    dscores = partition.take(gathered);
    weighted = partition.take(gathered);
    dlog_scale = partition.take<double>(slab_rows);
  }

  AptSlab<Arithmetic> slab(const AptSizes& size) const {
    const int64_t stride = scores_stride<Arithmetic>(size.P), rows = std::min(size.R, kRowsPerSlab);
    return {0, {dscores, stride, rows}, {weighted, stride, rows}, dlog_scale};
  }
};

template <class Arithmetic>
inline void apt_backward_by(const AptBackward& args, ParallelFor parallel_for) {
  const auto [R, D, P] = args.size;
  const int64_t stride = scores_stride<Arithmetic>(P), width = round_up(D, kLanes);
  const auto memory = parts_of<AptBackwardMemory<Arithmetic>>(call_scratch(), args);
  const PackedParts &prompts = memory.prompts, &keys = memory.keys;
  pack_transposed<Arithmetic>(args.prompts, D, P, prompts.rounded);
  pack<Arithmetic>(args.keys, P, D, keys.rounded);
  if (prompts.rest) pack_transposed<Arithmetic, Part::rest>(args.prompts, D, P, prompts.rest);
  if (keys.rest) pack<Arithmetic, Part::rest>(args.keys, P, D, keys.rest);
  const float scale = std::exp(read_scalar(args.log_scale));
  if (R == 0 && args.dkeys) std::fill_n(args.dkeys, P * D, 0.0f);
  if (R == 0 && args.dprompts) std::fill_n(args.dprompts, P * D, 0.0f);
  double dlog_scale = 0;
  AptSlab<Arithmetic> slab = memory.slab(args.size);
  for (; slab.begin < R; slab.begin += kRowsPerSlab) {
    const int64_t rows = std::min(kRowsPerSlab, R - slab.begin);
    const AptBackwardTile<Arithmetic> tile{args, prompts, keys, scale, slab};
    const int64_t scratch = factors_width(P) + kRowsPerTile * (2 * stride + width);
    for_each_tile(slab.begin, slab.begin + rows, scratch, parallel_for, tile);
    dlog_scale = std::accumulate(slab.dlog_scale, slab.dlog_scale + rows, dlog_scale);
    std::vector<WeightGradient> tasks;
    if (args.dkeys) tasks.push_back({args.dkeys, P, slab.dscores.left(), args.x, nullptr});
    if (args.dprompts) tasks.push_back({args.dprompts, P, slab.weighted.left(), args.dout, nullptr});
    add_weight_gradients<Arithmetic>(tasks, D, slab.begin, rows, parallel_for);
  }
  if (args.dlog_scale) *args.dlog_scale = static_cast<float>(dlog_scale);
  call_scratch().release_excess();
}

inline void apt_forward(const AptForward& args, ParallelFor parallel_for) {
  const Timed timed(Work::rest);
#ifdef PETL_BFLOAT16_PRODUCTS
  if (args.x.dtype == DType::bfloat16 || args.rounds_x) return apt_forward_by<PairArithmetic>(args, parallel_for);
#endif
  apt_forward_by<FloatArithmetic>(args, parallel_for);
}

inline void apt_backward(const AptBackward& args, ParallelFor parallel_for) {
  const Timed timed(Work::rest);
#ifdef PETL_BFLOAT16_PRODUCTS
  if (args.x.dtype == DType::bfloat16 || args.rounds_x) return apt_backward_by<PairArithmetic>(args, parallel_for);
#endif
  apt_backward_by<FloatArithmetic>(args, parallel_for);
}
