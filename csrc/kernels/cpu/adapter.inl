// The bottleneck adapter on the CPU. Whatever the tensors are, arithmetic is float32; only where the processor
// multiplies bfloat16 itself, and x is bfloat16, the factors of products are bfloat16 and their sums float32. In
// backward the products with down^T (Projection) are an exception, unless both factors come as bfloat16: they decide
// ReLU's mask, and where one is rounded the gradients are ten times less accurate.
// A part of path.inl.

// The weights' rows in float32, in whole vectors; those of the norm are null where there is none. LayerNorm's bias
// gives every row the same hidden units, down norm_bias, which down_bias holds already: so what the products say of x
// is not lost where that bias is far greater than the weight.
struct AdapterRows {
  const float *down_bias, *up_bias, *norm_weight, *norm_bias;
};

// The first product, (norm(x) - norm_bias) down^T, for the rows of one tile.
template <class Projection>
struct AdapterProjection {
  const AdapterInputs& args;
  const float* packed_down;  // down^T
  AdapterRows weights;

  // The norm's statistics are filled in. `wide` [rows, D in padded_width] is working memory.
  void operator()(int64_t begin, int64_t rows, RowStatistics* statistics, float* wide,
                  const StoreFloats& target) const {
    const auto [R, D, B] = args.size;
    const int64_t width = padded_width<Projection>(D);
    Left left{wide, width, 1};
    if (!weights.norm_weight && Projection::fits(args.x, D)) {
      left = Projection::rows_as_left(args.x, begin, rows, D, wide);
    } else {
      with_elements(args.x.dtype, [&](auto elements) {
        for (int64_t row = 0; row < rows; ++row) {
          widen(elements, row_of(args.x, begin + row), statistics[row], wide + row * width);
        }
      });
      left = Projection::values_as_left(wide, rows, width);
    }
    multiply<Projection>(rows, left, words<Projection>(D), packed_down, B, target);
  }

 private:
  // norm(x) - norm_bias of one row, with zeros up to padded_width.
  template <class X>
  void widen(X elements, const char* x, RowStatistics& statistics, float* target) const {
    const Timed timed(Work::normalization);
    const int64_t D = args.size.D;
    if (weights.norm_weight) statistics = statistics_of(elements, x, D, args.epsilon);
    for (int64_t d = 0; d < D; d += kLanes) {
      Vec value = elements.load_part(x + d * elements.kBytes, D - d);
      if (weights.norm_weight) value = statistics.normalized(value) * load(weights.norm_weight + d);
      store(target + d, value);
    }
    std::fill(target + D, target + padded_width<Projection>(D), 0.0f);
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

template <class Arithmetic>
struct AdapterForwardTile {
  const AdapterForward& args;
  AdapterProjection<Arithmetic> project;
  const float* packed_up;  // up^T
  float factor;

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const auto [R, D, B] = args.inputs.size;
    const int64_t stride = padded_width<Arithmetic>(B);
    float *factors = scratch, *hidden = factors + factors_width(B), *wide = hidden + kRowsPerTile * stride;
    RowStatistics statistics[kRowsPerTile];
    project(begin, rows, statistics, wide, StoreFloats{hidden, stride});
    activate(rows, hidden);
    if (args.inputs.dropout.seeds) drop_out(begin, rows, hidden, factors);
    const Left left = Arithmetic::values_as_left(hidden, rows, stride);
    with_elements(args.out.dtype, [&](auto elements) {
      const AdapterOutput<decltype(elements)> epilogue(args, begin, project.weights.up_bias, factor);
      multiply<Arithmetic>(rows, left, words<Arithmetic>(args.inputs.size.B), packed_up, args.inputs.size.D, epilogue);
    });
  }

  // hidden = act(hidden + down_bias)
  void activate(int64_t rows, float* hidden) const {
    const Timed timed(Work::activations);
    const int64_t B = args.inputs.size.B, stride = padded_width<Arithmetic>(B);
    with_activation(args.inputs.activation, [&](auto activation) {
      for (int64_t row = 0; row < rows; ++row, hidden += stride) {
        for (int64_t b = 0; b < B; b += kLanes) {
          store(hidden + b, activation.value(load(hidden + b) + load(project.weights.down_bias + b)));
        }
        std::fill(hidden + B, hidden + stride, 0.0f);
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
  float* rows;       // of adapter_rows

  AdapterForwardMemory(const AdapterSizes& size, Partition& partition)
      : down(partition.take(words<Arithmetic>(size.D) * padded_width<Arithmetic>(size.B))),
        up(partition.take(words<Arithmetic>(size.B) * round_up(size.D, kLanes))),
        rows(partition.take(adapter_rows_floats(size))) {}
};

template <class Arithmetic>
inline void adapter_forward_by(const AdapterForward& args, ParallelFor parallel_for) {
  const AdapterInputs& inputs = args.inputs;
  const auto [R, D, B] = inputs.size;
  const int64_t stride = padded_width<Arithmetic>(B);
  const auto memory = parts_of<AdapterForwardMemory<Arithmetic>>(call_scratch(), inputs.size);
  pack_transposed<Arithmetic>(inputs.down, D, B, memory.down);
  pack_transposed<Arithmetic>(inputs.up, B, D, memory.up);
  const AdapterForwardTile<Arithmetic> tile{
      args, {inputs, memory.down, adapter_rows(inputs, memory.rows)}, memory.up, adapter_factor(inputs)};
  const int64_t scratch = factors_width(B) + kRowsPerTile * (stride + padded_width<Arithmetic>(D));
  for_each_tile(0, R, scratch, parallel_for, tile);
  call_scratch().release_excess();
}

inline void adapter_forward(const AdapterForward& args, ParallelFor parallel_for) {
  const Timed timed(Work::rest);
#ifdef PETL_BFLOAT16_PRODUCTS
  if (args.inputs.x.dtype == DType::bfloat16) return adapter_forward_by<PairArithmetic>(args, parallel_for);
#endif
  adapter_forward_by<FloatArithmetic>(args, parallel_for);
}
