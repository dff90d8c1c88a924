// Backward of the bottleneck adapter on the CPU.
// A part of path.inl.

// What backward keeps of one slab of rows until all its tiles are done. dhidden is the gradient of the hidden units
// before their activation.
template <class Arithmetic>
struct AdapterSlab {
  int64_t begin;
  RowStatistics* statistics;     // [rows]
  Gathered<Arithmetic> dhidden;  // the left operand of ddown; see gather_normalized
  Gathered<Arithmetic> hidden;   // the left operand of dup
  float* dhidden_sums;           // [tiles, padded_width], over each tile's rows
  float* mean_sums;              // the same of what gather_normalized gathers, each row times its mean
  float* dout_sums;              // [tiles, D in whole vectors]
  double* dgain;                 // [rows], each row's share
};

// The sums over a row that LayerNorm's backward needs are known before the product dhidden down: with n = norm(x),
//   sum_d(dn * norm_weight)              = sum_b(dhidden[b] * weight_sums[b])
//   sum_d(dn * norm_weight * normalized) = sum_b(dhidden[b] * products[b])
// where weight_sums[b] = sum_d(down[b, d] * norm_weight[d]). These are the two sums of one row, divided by D.
struct RowGradient {
  float mean, slope;
};

// Epilogue: dx from the products dhidden down, for the rows of one tile.
template <class X>
struct AdapterInputGradient {
  const char* x;
  const char* dout;  // null: dx gains nothing
  char* dx;
  int64_t x_stride, dout_stride, D;
  bool rounds_x;
  const float* norm_weight;         // null: x is not normalized
  const RowStatistics* statistics;  // [rows]
  const RowGradient* gradients;     // [rows]

  AdapterInputGradient(const AdapterBackward& args, int64_t begin, const float* norm_weight,
                       const RowStatistics* statistics, const RowGradient* gradients)
      : x(row_of(args.inputs.x, begin)),
        dout(args.residual_is_input ? row_of(args.dout, begin) : nullptr),
        dx(row_of(args.dx, begin, args.inputs.size.D)),
        x_stride(args.inputs.x.stride),
        dout_stride(args.dout.stride),
        D(args.inputs.size.D),
        rounds_x(args.inputs.rounds_x),
        norm_weight(norm_weight),
        statistics(statistics),
        gradients(gradients) {}

  void prefetch(int64_t row, int64_t column, int64_t columns) const {
    if (norm_weight) prefetch_lines<false>(x + (row * x_stride + column) * X::kBytes, columns * X::kBytes);
    if (dout) prefetch_lines<false>(dout + (row * dout_stride + column) * X::kBytes, columns * X::kBytes);
    prefetch_lines<true>(dx + (row * D + column) * X::kBytes, columns * X::kBytes);
  }

  void operator()(int64_t row, int64_t column, Vec value) const {
    const int64_t count = D - column;
    if (norm_weight) {
      const RowStatistics& of = statistics[row];
      Vec input = X::load_part(x + (row * x_stride + column) * X::kBytes, count);
      if (rounds_x) input = from_bfloat16(to_bfloat16(input));
      const Vec normalized = of.normalized(input);
      value = value * load(norm_weight + column) - gradients[row].mean - normalized * gradients[row].slope;
      value *= of.inverse;
    }
    if (dout) value += X::load_part(dout + (row * dout_stride + column) * X::kBytes, count);
    X::store_part(dx + (row * D + column) * X::kBytes, value, count);
  }
};

// From x and dout to dx and to what the weights' gradients need, for a tile of one slab.
template <class Arithmetic, class Projection>
struct AdapterBackwardTile {
  const AdapterBackward& args;
  AdapterProjection<Projection> project;
  const float* packed_up;    // up
  const float* packed_down;  // down
  float factor;
  const float* weight_sums;  // [B]; null: x is not normalized
  AdapterSlab<Arithmetic> slab;

  void operator()(int64_t begin, int64_t rows, float* scratch) const {
    const auto [R, D, B] = args.inputs.size;
    const int64_t stride = padded_width<Arithmetic>(B), offset = begin - slab.begin;
    float *factors = scratch, *hidden = factors + factors_width(B), *dhidden = hidden + kRowsPerTile * stride;
    float* wide = dhidden + kRowsPerTile * stride;
    RowGradient gradients[kRowsPerTile];
    RowStatistics* const statistics = slab.statistics + offset;
    if (args.raw.data) {
      if (project.weights.norm_weight) project.only_statistics(begin, rows, statistics, wide);
      read_products(begin, rows, hidden);
    } else {
      const Left x = project.rows(begin, rows, statistics, wide);
      project.multiply_rows(rows, x, statistics, StoreFloats{hidden, stride});
    }
    const Left dout = Arithmetic::rows_as_left(args.dout, begin, rows, D, wide);
    multiply<Arithmetic>(rows, dout, words<Arithmetic>(D), packed_up, B, StoreFloats{dhidden, stride});
    hidden_gradients(begin, rows, hidden, dhidden, factors, gradients);
    if (args.dgain) add_bias_shares(begin, rows);
    if (args.ddown) {
      const int64_t tile = offset / kRowsPerTile;
      slab.hidden.fill(offset, rows, hidden);
      gather_dhidden(offset, rows, dhidden, slab.mean_sums + tile * stride);
      sum_columns({dhidden, stride, DType::float32}, 0, rows, B, slab.dhidden_sums + tile * stride);
      sum_columns(args.dout, begin, rows, D, slab.dout_sums + tile * round_up(D, kLanes));
    }
    if (args.dx.data) input_gradient(begin, rows, Arithmetic::values_as_left(dhidden, rows, stride), gradients);
  }

  // The products norm(x) down^T from what forward kept.
  void read_products(int64_t begin, int64_t rows, float* products) const {
    const Timed timed(Work::activations);
    const int64_t B = args.inputs.size.B, stride = padded_width<Arithmetic>(B);
    const bool has_bias = !project.weights.norm_weight;
    with_elements(args.raw.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row, products += stride) {
        const char* raw = row_of(args.raw, begin + row);
        for (int64_t b = 0; b < B; b += kLanes) {
          const Vec kept = elements.load_part(raw + b * elements.kBytes, B - b);
          store(products + b, has_bias ? kept - load(project.weights.down_bias + b) : kept);
        }
      }
    });
  }

  // Of rows [first, first + rows) of the slab.
  void gather_dhidden(int64_t first, int64_t rows, const float* dhidden, float* sums) const {
    if constexpr (Arithmetic::kPerWord > 1) {
      if (project.weights.norm_weight) return gather_normalized(first, rows, dhidden, sums);
    }
    slab.dhidden.fill(first, rows, dhidden);
  }

  // In pairs ddown is a product with x itself, and not with what LayerNorm makes of it, which rounding would change:
  // with m the mean of a row,
  //   dhidden^T normalized = (inverse dhidden)^T x - (inverse dhidden)^T m.
  // `sums` [padded_width] becomes the last term, of the rounded values.
  void gather_normalized(int64_t first_row, int64_t rows, const float* dhidden, float* sums) const {
    const int64_t stride = padded_width<Arithmetic>(args.inputs.size.B);
    std::fill_n(sums, stride, 0.0f);
    slab.dhidden.fill_with(first_row, rows, [&](int64_t row, int64_t b) {
      const bool is_alone = row + 1 == rows;
      const RowStatistics* of = slab.statistics + first_row + row;
      const RowStatistics first = of[0], second = is_alone ? RowStatistics{} : of[1];
      const float* values = dhidden + row * stride + b;
      const HalfBitsVec upper = to_bfloat16(first.inverse * load(values));
      const HalfBitsVec lower = is_alone ? HalfBitsVec{} : to_bfloat16(second.inverse * load(values + stride));
      const Vec a = from_bfloat16(upper), c = from_bfloat16(lower);
      store(sums + b,
            load(sums + b) + (a * first.mean + c * second.mean) + (a * first.mean_rest + c * second.mean_rest));
      return Arithmetic::interleave(upper, lower);
    });
  }

  // The products norm(x) down^T become the hidden units, and the products dout up become dhidden, both in place.
  // `factors` is working memory.
  void hidden_gradients(int64_t begin, int64_t rows, float* hidden, float* dhidden, float* factors,
                        RowGradient* gradients) const {
    const Timed timed(Work::activations);
    const Dropout& dropout = args.inputs.dropout;
    const int64_t width = args.inputs.size.B, stride = padded_width<Arithmetic>(width);
    double* dgain = slab.dgain + begin - slab.begin;
    with_activation(args.inputs.activation, [&](auto activation) {
      for (int64_t row = 0; row < rows; ++row, hidden += stride, dhidden += stride) {
        if (dropout.seeds) {
          keep_factors(dropout, begin + row, width, factors);
          multiply_by(factors, width, dhidden);
        }
        gradients[row] = hidden_gradient(activation, hidden, dhidden, dgain + row);
        if (dropout.seeds) multiply_by(factors, width, hidden);
      }
    });
  }

  // For one row; *dgain becomes sum(dhidden * hidden) before the factor.
  template <class Activated>
  RowGradient hidden_gradient(Activated activation, float* hidden, float* dhidden, double* dgain) const {
    const int64_t B = args.inputs.size.B, stride = padded_width<Arithmetic>(B);
    // Zeros stay zeros below, whatever the activation.
    std::fill(hidden + B, hidden + stride, 0.0f);
    std::fill(dhidden + B, dhidden + stride, 0.0f);
    Vec shares = {}, means = {}, slopes = {};
    for (int64_t b = 0; b < B; b += kLanes) {
      const Vec product = load(hidden + b), raw = product + load(project.weights.down_bias + b);
      const Vec value = activation.value(raw), dvalue = load(dhidden + b);
      const Vec draw = factor * activation.gradient(raw, dvalue);
      shares += value * dvalue;
      if (weight_sums) {
        means += draw * load(weight_sums + b);
        slopes += draw * product;
      }
      store(hidden + b, value);
      store(dhidden + b, draw);
    }
    *dgain = sum_lanes(shares);
    const double D = static_cast<double>(args.inputs.size.D);
    return {static_cast<float>(sum_lanes(means) / D), static_cast<float>(sum_lanes(slopes) / D)};
  }

  // dgain += sum(dout * up_bias) for each row
  void add_bias_shares(int64_t begin, int64_t rows) const {
    const Timed timed(Work::column_sums);
    const int64_t D = args.inputs.size.D;
    with_elements(args.dout.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* dout = row_of(args.dout, begin + row);
        Vec sums = {};
        for (int64_t d = 0; d < D; d += kLanes) {
          sums += elements.load_part(dout + d * elements.kBytes, D - d) * load(project.weights.up_bias + d);
        }
        slab.dgain[begin - slab.begin + row] += sum_lanes(sums);
      }
    });
  }

  // sums [columns in whole vectors] over rows [begin, begin + rows)
  static void sum_columns(const ConstRows& source, int64_t begin, int64_t rows, int64_t columns, float* sums) {
    const Timed timed(Work::column_sums);
    std::fill_n(sums, round_up(columns, kLanes), 0.0f);
    with_elements(source.dtype, [&](auto elements) {
      for (int64_t row = 0; row < rows; ++row) {
        const char* from = row_of(source, begin + row);
        for (int64_t i = 0; i < columns; i += kLanes) {
          store(sums + i, load(sums + i) + elements.load_part(from + i * elements.kBytes, columns - i));
        }
      }
    });
  }

  void input_gradient(int64_t begin, int64_t rows, Left dhidden, const RowGradient* gradients) const {
    const int64_t D = args.inputs.size.D, depth = words<Arithmetic>(args.inputs.size.B);
    with_elements(args.dx.dtype, [&](auto elements) {
      const AdapterInputGradient<decltype(elements)> epilogue(args, begin, project.weights.norm_weight,
                                                              slab.statistics + begin - slab.begin, gradients);
      multiply<Arithmetic>(rows, dhidden, depth, packed_down, D, epilogue);
    });
  }
};

// target [columns] += each of `count` rows of `sums`, in order.
inline void add_rows(const float* sums, int64_t count, int64_t stride, int64_t columns, float* target) {
  const Timed timed(Work::column_sums);
  for (int64_t i = 0; i < count; ++i, sums += stride) {
    for (int64_t column = 0; column < columns; ++column) target[column] += sums[column];
  }
}

// dup [D, B] = factor * transposed [B, D], and dup_bias likewise.
inline void finish_up_gradient(const AdapterBackward& args, float factor, const float* transposed) {
  const Timed timed(Work::column_sums);
  const auto [R, D, B] = args.inputs.size;
  for (int64_t d = 0; d < D; d += kLanes) {
    for (int64_t b = 0; b < B; b += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, B - b), columns = std::min<int64_t>(kLanes, D - d);
      Vec square[kLanes] = {};
      for (int64_t i = 0; i < rows; ++i) square[i] = factor * Floats::load_part(transposed + (b + i) * D + d, columns);
      transpose(square);
      for (int64_t i = 0; i < columns; ++i) Floats::store_part(args.dup + (d + i) * B + b, square[i], rows);
    }
  }
  for (int64_t d = 0; d < D; ++d) args.dup_bias[d] *= factor;
}

// ddown comes as g = dhidden^T normalized, from which all three gradients follow:
//   ddown = g * norm_weight + ddown_bias norm_bias^T
//   dnorm_weight = sum_b(down[b] * g[b])    dnorm_bias = sum_b(down[b] * ddown_bias[b])
// `means` [B] is to be taken from each column of g; null: nothing.
inline void finish_norm_gradients(const AdapterBackward& args, const AdapterRows& weights, const float* means) {
  const Timed timed(Work::column_sums);
  const auto [R, D, B] = args.inputs.size;
  std::fill_n(args.dnorm_weight, D, 0.0f);
  std::fill_n(args.dnorm_bias, D, 0.0f);
  for (int64_t b = 0; b < B; ++b) {
    float* gradient = args.ddown + b * D;
    with_elements(args.inputs.down.dtype, [&](auto elements) {
      const char* down = row_of(args.inputs.down, b);
      const float dbias = args.ddown_bias[b], mean = means ? means[b] : 0.0f;
      const int64_t width = args.inputs.size.D;
      const auto add = [&](float* sums, int64_t d, Vec value) {
        Floats::store_part(sums + d, Floats::load_part(sums + d, width - d) + value, width - d);
      };
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec weight = elements.load_part(down + d * elements.kBytes, width - d);
        const Vec g = Floats::load_part(gradient + d, width - d) - mean;
        add(args.dnorm_weight, d, weight * g);
        add(args.dnorm_bias, d, weight * dbias);
        Floats::store_part(gradient + d, g * load(weights.norm_weight + d) + dbias * load(weights.norm_bias + d),
                           width - d);
      }
    });
  }
}

template <class Arithmetic, class Projection>
struct AdapterBackwardMemory {
  float *project_down, *up, *down;  // packed, the first transposed
  float* down_sums;                 // of AdapterProjection
  float* means;                     // [B, padded], of finish_norm_gradients
  float* rows;                      // of adapter_rows
  float* weight_sums;               // [B, padded]
  float* dup;                       // [B, D]
  RowStatistics* statistics;        // this and what follows: of AdapterSlab
  float *dhidden, *hidden, *dhidden_sums, *mean_sums, *dout_sums;
  double* dgain;

  AdapterBackwardMemory(const AdapterBackward& args, Partition& partition) {
    const auto [R, D, B] = args.inputs.size;
    const int64_t stride = padded_width<Arithmetic>(B), width = round_up(D, kLanes);
    const int64_t slab_rows = std::min(R, kRowsPerSlab);
    const int64_t slab_tiles = round_up(slab_rows, kRowsPerTile) / kRowsPerTile;
    const int64_t gathered = args.ddown ? Gathered<Arithmetic>::floats(stride, slab_rows) : 0;
    project_down = partition.take(args.raw.data ? 0 : words<Projection>(D) * stride);
    down_sums = partition.take(stride);
    means = partition.take(stride);
    up = partition.take(words<Arithmetic>(D) * stride);
    down = partition.take(words<Arithmetic>(B) * width);
    rows = partition.take(adapter_rows_floats(args.inputs.size));
    weight_sums = partition.take(stride);
    dup = partition.take(args.ddown ? B * D : 0);
    statistics = partition.take<RowStatistics>(slab_rows);
    dhidden = partition.take(gathered);
    hidden = partition.take(gathered);
    dhidden_sums = partition.take(slab_tiles * stride);
    mean_sums = partition.take(slab_tiles * stride);
    dout_sums = partition.take(slab_tiles * width);
    dgain = partition.take<double>(slab_rows);
  }

  AdapterSlab<Arithmetic> slab(const AdapterSizes& size) const {
    const int64_t stride = padded_width<Arithmetic>(size.B), rows = std::min(size.R, kRowsPerSlab);
    return {0, statistics, {dhidden, stride, rows}, {hidden, stride, rows}, dhidden_sums, mean_sums, dout_sums, dgain};
  }
};

template <class Arithmetic, class Projection>
inline void adapter_backward_by(const AdapterBackward& args, ParallelFor parallel_for) {
  const AdapterInputs& inputs = args.inputs;
  const auto [R, D, B] = inputs.size;
  const bool has_norm = inputs.norm_weight.data, has_weights = args.ddown;
  const bool has_means = has_norm && Arithmetic::kPerWord > 1;
  const int64_t stride = padded_width<Arithmetic>(B), width = round_up(D, kLanes);
  const auto memory = parts_of<AdapterBackwardMemory<Arithmetic, Projection>>(call_scratch(), args);
  pack<Arithmetic>(inputs.up, D, B, memory.up);
  pack<Arithmetic>(inputs.down, B, D, memory.down);
  const AdapterRows weights = adapter_rows(inputs, memory.rows);
  const AdapterProjection<Projection> project{inputs, memory.project_down, memory.down_sums, weights};
  if (!args.raw.data) project.pack();
  if (has_norm) {
    std::fill_n(memory.weight_sums, stride, 0.0f);
    add_products_with_down(inputs, weights.norm_weight, memory.weight_sums);
  }
  const float factor = adapter_factor(inputs);
  if (has_weights) {
    std::fill_n(args.ddown_bias, B, 0.0f);
    std::fill_n(args.dup_bias, D, 0.0f);
    std::fill_n(memory.means, B, 0.0f);
    if (R == 0) std::fill_n(args.ddown, B * D, 0.0f);
    if (R == 0) std::fill_n(memory.dup, B * D, 0.0f);
  }
  AdapterSlab<Arithmetic> slab = memory.slab(inputs.size);
  double dgain = 0;
  for (; slab.begin < R; slab.begin += kRowsPerSlab) {
    const int64_t slab_end = std::min(R, slab.begin + kRowsPerSlab), count = slab_end - slab.begin;
    const AdapterBackwardTile<Arithmetic, Projection> tile{
        args, project, memory.up, memory.down, factor, has_norm ? memory.weight_sums : nullptr, slab};
    const int64_t scratch = factors_width(B) + kRowsPerTile * (2 * stride + padded_width<Arithmetic>(D));
    for_each_tile(slab.begin, slab_end, scratch, parallel_for, tile);
    dgain = std::accumulate(slab.dgain, slab.dgain + count, dgain);
    if (!has_weights) continue;
    const int64_t tiles = round_up(count, kRowsPerTile) / kRowsPerTile;
    add_rows(slab.dhidden_sums, tiles, stride, B, args.ddown_bias);
    add_rows(slab.dout_sums, tiles, width, D, args.dup_bias);
    if (has_means) add_rows(slab.mean_sums, tiles, stride, B, memory.means);
    const std::vector<WeightGradient> tasks{
        {args.ddown, B, slab.dhidden.left(), inputs.x, has_norm && !has_means ? slab.statistics : nullptr},
        {memory.dup, B, slab.hidden.left(), args.dout, nullptr}};
    add_weight_gradients<Arithmetic>(tasks, D, slab.begin, count, parallel_for);
  }
  if (has_weights) finish_up_gradient(args, factor, memory.dup);
  if (has_weights && has_norm) finish_norm_gradients(args, weights, has_means ? memory.means : nullptr);
  if (args.dgain) *args.dgain = static_cast<float>(inputs.scale * dgain);
  call_scratch().release_excess();
}

inline void adapter_backward(const AdapterBackward& args, ParallelFor parallel_for) {
  const Timed timed(Work::rest);
#ifdef PETL_BFLOAT16_PRODUCTS
  if (multiplies_pairs(args.inputs)) {
    const bool is_rounded = args.inputs.norm_weight.data || PairArithmetic::rounds(args.inputs.down.dtype);
    if (args.raw.data || !is_rounded) return adapter_backward_by<PairArithmetic, PairArithmetic>(args, parallel_for);
    return adapter_backward_by<PairArithmetic, FloatArithmetic>(args, parallel_for);
  }
#endif
  adapter_backward_by<FloatArithmetic, FloatArithmetic>(args, parallel_for);
}
