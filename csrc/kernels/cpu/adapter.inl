// The bottleneck adapter on the CPU. Whatever the tensors are, arithmetic is float32; only where the processor
// multiplies bfloat16 itself, and x is bfloat16 or to be rounded to it, the factors of products are bfloat16 and their
// sums float32. What rounding does to ReLU's mask, by which gradients would become ten times less accurate, is undone:
// in what forward keeps by ExactSums, and where it keeps nothing by a first product in float32 (Projection).
// A part of path.inl.

// The weights' rows in float32, in whole vectors; those of the norm are null where there is none. LayerNorm's bias
// gives every row the same hidden units, down norm_bias, which down_bias holds already: so what the products say of x
// is not lost where that bias is far greater than the weight.
struct AdapterRows {
  const float *down_bias, *up_bias, *norm_weight, *norm_bias;
};

// What the first product, (norm(x) - norm_bias) down^T, takes. Words of float32 are made of the normalized rows. Pairs
// are those of x itself, and the norm's weight is packed with down: with m the mean of a row,
//   (norm(x) - norm_bias) down^T = inverse (x (norm_weight down)^T - m sum_d(norm_weight down)).
// The sums are those of the weights as they are packed, so that a great mean takes away what it has added.
template <class Projection>
struct AdapterProjection {
  const AdapterInputs& args;
  float* packed_down;  // [words of D, padded_width], transposed
  float* down_sums;    // [padded_width]; of pairs alone
  AdapterRows weights;

  bool normalizes_sums() const { return Projection::kPerWord > 1 && weights.norm_weight; }

  void pack() const {
    const int64_t D = args.size.D, B = args.size.B;
    pack_transposed<Projection>(args.down, D, B, packed_down, normalizes_sums() ? weights.norm_weight : nullptr);
    if (normalizes_sums()) sum_packed<Projection>(packed_down, words<Projection>(D), B, down_sums);
  }

  // The rows of one tile as the left operand. The norm's statistics are filled in. `wide` [rows, D in padded_width] is
  // working memory.
  Left rows(int64_t begin, int64_t rows, RowStatistics* statistics, float* wide) const {
    const int64_t D = args.size.D, width = padded_width<Projection>(D);
    if (weights.norm_weight && Projection::kPerWord == 1) {
      with_elements(args.x.dtype, [&](auto elements) {
        for (int64_t row = 0; row < rows; ++row) {
          widen(elements, row_of(args.x, begin + row), statistics[row], wide + row * width);
        }
      });
      return {wide, width, 1};
    }
    const Left left = Projection::rows_as_left(args.x, begin, rows, D, wide);
    if (weights.norm_weight) find_statistics(Projection::rows_of(left), 0, rows, statistics);
    return left;
  }

  // What `rows` fills in, where the rows themselves are not needed.
  void only_statistics(int64_t begin, int64_t count, RowStatistics* statistics, float* wide) const {
    if (Projection::kPerWord > 1) {
      rows(begin, count, statistics, wide);
    } else {
      find_statistics(args.x, begin, count, statistics);
    }
  }

  // The product, for the rows of one tile.
  void multiply_rows(int64_t count, Left rows, const RowStatistics* statistics, const StoreFloats& target) const {
    const int64_t B = args.size.B, depth = words<Projection>(args.size.D);
    if (normalizes_sums()) {
      return multiply<Projection>(count, rows, depth, packed_down, B, StoreNormalized{target, statistics, down_sums});
    }
    multiply<Projection>(count, rows, depth, packed_down, B, target);
  }

  void find_statistics(const ConstRows& source, int64_t begin, int64_t rows, RowStatistics* statistics) const {
    const Timed timed(Work::normalization);
    with_elements(source.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        statistics[row] = statistics_of(elements, row_of(source, begin + row), args.size.D, args.epsilon);
      }
    });
  }

 private:
  // Epilogue: the sums of rows that are not normalized yet.
  struct StoreNormalized {
    StoreFloats target;
    const RowStatistics* statistics;
    const float* down_sums;

    void prefetch(int64_t, int64_t, int64_t) const {}
    void operator()(int64_t row, int64_t column, Vec value) const {
      const RowStatistics& of = statistics[row];
      const Vec sums = load(down_sums + column);
      target(row, column, ((value - of.mean * sums) - of.mean_rest * sums) * of.inverse);
    }
  };

  // norm(x) - norm_bias of one row.
  template <class X>
  void widen(X elements, const char* x, RowStatistics& statistics, float* target) const {
    const Timed timed(Work::normalization);
    const int64_t D = args.size.D;
    statistics = statistics_of(elements, x, D, args.epsilon);
    for (int64_t d = 0; d < D; d += kLanes) {
      const Vec value = elements.load_part(x + d * elements.kBytes, D - d);
      store(target + d, statistics.normalized(value) * load(weights.norm_weight + d));
    }
  }
};

// Epilogue: out = residual + factor * (hidden up^T + up_bias), for the rows of one tile.
template <class X>
struct AdapterOutput {
  const char* residual;  // null: none
  char* out;
  int64_t residual_stride, D;
  const float* up_bias;
  float factor;

  AdapterOutput(const AdapterForward& args, int64_t begin, const float* up_bias, float factor)
      : residual(args.residual.data ? row_of(args.residual, begin) : nullptr),
        out(row_of(args.out, begin, args.inputs.size.D)),
        residual_stride(args.residual.stride),
        D(args.inputs.size.D),
        up_bias(up_bias),
        factor(factor) {}

  void prefetch(int64_t row, int64_t column, int64_t columns) const {
    if (residual) {
      prefetch_lines<false>(residual + (row * residual_stride + column) * X::kBytes, columns * X::kBytes);
    }
    prefetch_lines<true>(out + (row * D + column) * X::kBytes, columns * X::kBytes);
  }

  void operator()(int64_t row, int64_t column, Vec value) const {
    value = factor * (value + load(up_bias + column));
    if (residual) value += X::load_part(residual + (row * residual_stride + column) * X::kBytes, D - column);
    X::store_part(out + (row * D + column) * X::kBytes, value, D - column);
  }
};

// sum - bias in bfloat16: rounded, but so that with the bias it is above zero where the sum is, and nowhere else.
inline Vec with_sign_of_sum(Vec sum, Vec bias) {
  constexpr uint32_t kUnit = 1u << 16;  // in the last place
  Vec rounded = from_bfloat16(to_bfloat16(sum - bias));
  for (uint32_t wrong = lanes_where((rounded + bias > 0.0f) != (sum > 0.0f)); wrong; wrong &= wrong - 1) {
    const int lane = __builtin_ctz(wrong);
    // The neighbor on the other side of the product; the bits of a negative number grow as it falls.
    const uint32_t bits = as_bits(rounded)[lane], size = bits & 0x7fffffff;
    const bool grows = sum[lane] > 0.0f;
    const uint32_t is_negative = bits >> 31;
    BitsVec all = as_bits(rounded);
    all[lane] = size == 0 ? kUnit | (grows ? 0 : 0x80000000u) : grows != is_negative ? bits + kUnit : bits - kUnit;
    rounded = as_float(all);
  }
  return rounded;
}

template <class Arithmetic>
struct AdapterForwardTile {
  const AdapterForward& args;
  AdapterProjection<Arithmetic> project;
  const float* packed_up;              // up^T
  const ExactSums<Arithmetic>* exact;  // null where nothing is rounded, or nobody asks for the sums' signs
  float factor;

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const auto [R, D, B] = args.inputs.size;
    const int64_t stride = padded_width<Arithmetic>(B);
    float *factors = scratch, *hidden = factors + factors_width(B), *wide = hidden + kRowsPerTile * stride;
    RowStatistics statistics[kRowsPerTile];
    const Left x = project.rows(begin, rows, statistics, wide);
    project.multiply_rows(rows, x, statistics, StoreFloats{hidden, stride});
    activate(begin, rows, x, statistics, hidden, factors);
    if (args.inputs.dropout.seeds) drop_out(begin, rows, hidden, factors);
    const Left left = Arithmetic::values_as_left(hidden, rows, stride);
    with_elements(args.out.dtype, [&](auto elements) {
      const AdapterOutput<decltype(elements)> epilogue(args, begin, project.weights.up_bias, factor);
      multiply<Arithmetic>(rows, left, words<Arithmetic>(args.inputs.size.B), packed_up, args.inputs.size.D, epilogue);
    });
  }

  // hidden = act(hidden + down_bias). `sums` is working memory.
  void activate(int64_t begin, int64_t rows, const Left& x, const RowStatistics* statistics, float* hidden,
                float* sums) const {
    const Timed timed(Work::activations);
    const int64_t B = args.inputs.size.B, stride = padded_width<Arithmetic>(B);
    with_activation(args.inputs.activation, [&](auto activation) {
      for (int64_t row = 0; row < rows; ++row, hidden += stride) {
        if (args.raw.data) {
          keep(x.data + row * x.row, project.weights.norm_weight ? statistics + row : nullptr, begin + row, hidden,
               sums);
        }
        for (int64_t b = 0; b < B; b += kLanes) {
          store(hidden + b, activation.value(load(hidden + b) + load(project.weights.down_bias + b)));
        }
        std::fill(hidden + B, hidden + stride, 0.0f);
      }
    });
  }

  // What backward takes for the products of one row. Without a norm it is their sums with the bias, which are rounded
  // once; with one it is the products, since the norm's gradients hang on what they say beside the bias. Backward's
  // masks are those of the sums as they would be had nothing been rounded; where forward's are others, the sums are so
  // near to zero that it does not matter.
  void keep(const float* x, const RowStatistics* statistics, int64_t row, const float* products, float* sums) const {
    const int64_t B = args.inputs.size.B;
    const float* bias = project.weights.down_bias;
    for (int64_t b = 0; b < B; b += kLanes) store(sums + b, load(products + b) + load(bias + b));
    if (exact) exact->correct(x, statistics, bias, sums);
    with_elements(args.raw.dtype, [&](auto elements) {
      char* target = row_of(args.raw, row, B);
      for (int64_t b = 0; b < B; b += kLanes) {
        Vec kept = load(sums + b);
        if (project.weights.norm_weight) {
          kept = elements.kType == DType::bfloat16 ? with_sign_of_sum(kept, load(bias + b)) : load(products + b);
        }
        elements.store_part(target + b * elements.kBytes, kept, B - b);
      }
    });
  }

  // `factors` is working memory.
  void drop_out(int64_t begin, int64_t rows, float* hidden, float* factors) const {
    const Timed timed(Work::activations);
    const int64_t B = args.inputs.size.B, stride = padded_width<Arithmetic>(B);
    for (int64_t row = 0; row < rows; ++row) {
      keep_factors(args.inputs.dropout, begin + row, B, factors);
      multiply_by(factors, B, hidden + row * stride);
    }
  }
};

#ifdef PETL_BFLOAT16_PRODUCTS
inline bool multiplies_pairs(const AdapterInputs& args) { return args.x.dtype == DType::bfloat16 || args.rounds_x; }
#endif

inline float adapter_factor(const AdapterInputs& args) {
  return args.gain.data ? args.scale * read_scalar(args.gain) : args.scale;
}

// sums [B] += down row, for a row of D floats in whole vectors.
inline void add_products_with_down(const AdapterInputs& args, const float* row, float* sums) {
  const Timed timed(Work::packing);
  const auto [R, D, B] = args.size;
  for (int64_t b = 0; b < B; ++b) {
    Vec products[kChains] = {};
    with_elements(args.down.dtype, [&](auto elements) {
      for_each_vector(elements, row_of(args.down, b), args.size.D,
                      [&](int chain, int64_t d, Vec value) { products[chain] += value * load(row + d); });
    });
    sums[b] = static_cast<float>(sums[b] + sum_chains(products));
  }
}

inline int64_t adapter_rows_floats(const AdapterSizes& size) {
  return round_up(size.B, kLanes) + 3 * round_up(size.D, kLanes);
}

// `memory` holds adapter_rows_floats.
inline AdapterRows adapter_rows(const AdapterInputs& args, float* memory) {
  const auto [R, D, B] = args.size;
  const int64_t hidden_width = round_up(B, kLanes), width = round_up(D, kLanes);
  float *down_bias = memory, *up_bias = down_bias + hidden_width;
  widen_row(args.down_bias, B, down_bias);
  widen_row(args.up_bias, D, up_bias);
  if (!args.norm_weight.data) return {down_bias, up_bias, nullptr, nullptr};
  float *norm_weight = up_bias + width, *norm_bias = norm_weight + width;
  widen_row(args.norm_weight, D, norm_weight);
  widen_row(args.norm_bias, D, norm_bias);
  add_products_with_down(args, norm_bias, down_bias);
  return {down_bias, up_bias, norm_weight, norm_bias};
}

template <class Arithmetic>
struct AdapterForwardMemory {
  float *down, *up;  // packed, transposed
  float* down_sums;  // of AdapterProjection
  float* rows;       // of adapter_rows
  float* rounding;   // of ExactSums

  AdapterForwardMemory(const AdapterSizes& size, Partition& partition)
      : down(partition.take(words<Arithmetic>(size.D) * padded_width<Arithmetic>(size.B))),
        up(partition.take(words<Arithmetic>(size.B) * round_up(size.D, kLanes))),
        down_sums(partition.take(padded_width<Arithmetic>(size.B))),
        rows(partition.take(adapter_rows_floats(size))),
        rounding(partition.take(round_up(size.B, kLanes))) {}
};

template <class Arithmetic>
inline void adapter_forward_by(const AdapterForward& args, ParallelFor parallel_for) {
  const AdapterInputs& inputs = args.inputs;
  const auto [R, D, B] = inputs.size;
  const int64_t stride = padded_width<Arithmetic>(B);
  const bool is_rounded =
      Arithmetic::rounds(inputs.down.dtype) || (Arithmetic::kPerWord > 1 && inputs.norm_weight.data);
  const bool is_exact = args.raw.data && is_rounded && inputs.activation == AdapterActivation::relu;
  const auto memory = parts_of<AdapterForwardMemory<Arithmetic>>(call_scratch(), inputs.size);
  const AdapterProjection<Arithmetic> project{inputs, memory.down, memory.down_sums, adapter_rows(inputs, memory.rows)};
  project.pack();
  pack_transposed<Arithmetic>(inputs.up, B, D, memory.up);
  std::optional<ExactSums<Arithmetic>> exact;
  if (is_exact) exact.emplace(inputs.down, project.weights.norm_weight, B, D, memory.rounding);
  const AdapterForwardTile<Arithmetic> tile{args, project, memory.up, exact ? &*exact : nullptr,
                                            adapter_factor(inputs)};
  const int64_t scratch = factors_width(B) + kRowsPerTile * (stride + padded_width<Arithmetic>(D));
  for_each_tile(0, R, scratch, parallel_for, tile);
  call_scratch().release_excess();
}

inline void adapter_forward(const AdapterForward& args, ParallelFor parallel_for) {
  const Timed timed(Work::rest);
#ifdef PETL_BFLOAT16_PRODUCTS
  if (multiplies_pairs(args.inputs)) return adapter_forward_by<PairArithmetic>(args, parallel_for);
#endif
  adapter_forward_by<FloatArithmetic>(args, parallel_for);
}
