// Backward of attention pooling on the CPU.
// A part of path.inl.

// Epilogue: row m of the result goes to row tokens[m] of a sample's dvisual.
template <class Target>
struct StoreTokens {
  char* target;
  int64_t D;
  const int64_t* tokens;

  void operator()(int64_t row, int64_t column, Vec value) const {
    Target::store_part(target + (tokens[row] * D + column) * Target::kBytes, value, D - column);
  }
};

// What backward knows of each head of a sample before it sees a token; each is [heads_width(H)].
struct AttentionPoolHeads {
  float* best;    // the greatest score
  float* factor;  // 1 / the sum of exp(score - best)
  float* mean;    // dpooled . pooled, the mean of visual dpooled^T by the weights
  float* rest;    // what rounding left out of it

  AttentionPoolHeads(float* memory, int64_t stride)
      : best(memory), factor(best + stride), mean(factor + stride), rest(mean + stride) {}
};

// Where one token has most of a head's weight, its product with dpooled is nearly the mean, and of their difference, on
// which the gradients depend, rounding leaves little. Of such heads the mean is corrected, for which the sample's
// tokens are read once more. The greatest weight is 1 / the sum of exp(score - best).
inline bool is_concentrated(float total) { return total < 2; }

// One sample's tokens in backward, tile by tile: with dw = visual dpooled^T,
//   w = exp(scale * visual query^T - best) * factor    dscores = w * (dw - sum_n(w dw)), where the sum is mean + rest.
template <class Arithmetic>
struct AttentionPoolScores {
  const AttentionPoolBackward& args;
  int64_t sample, stride;
  float* tokens_scratch;     // of for_each_tile
  float *dscores, *weights;  // [kTokensPerTile, stride]
  AttentionPoolHeads heads;
  RowOperand<Arithmetic> query, dpooled;

  static int64_t scratch_floats(const AttentionPoolSizes& size) {
    return (kTokensPerTile + 2 * size.H) * spread_width(size.D) + (2 * kTokensPerTile + 4) * heads_width(size.H);
  }

  AttentionPoolScores(const AttentionPoolBackward& args, int64_t sample, float* scratch)
      : args(args),
        sample(sample),
        stride(padded_width<Arithmetic>(size().H)),
        tokens_scratch(scratch),
        dscores(scratch + (kTokensPerTile + 2 * size().H) * spread_width(size().D)),
        weights(dscores + kTokensPerTile * stride),
        heads(weights + kTokensPerTile * stride, stride),
        query(
            heads_of<Arithmetic>(args.inputs.query, sample, size(), scratch + kTokensPerTile * spread_width(size().D))),
        dpooled(heads_of<Arithmetic>(args.dpooled, sample, size(),
                                     scratch + (kTokensPerTile + size().H) * spread_width(size().D))) {
    std::fill(dscores, heads.rest + stride, 0.0f);
    RowOperand<Arithmetic> pooled(1, size().D, tokens_scratch);
    for (int64_t h = 0; h < size().H; ++h) {
      const int64_t row = sample * size().H + h;
      heads.best[h] = args.statistics[row];
      heads.factor[h] = 1 / args.statistics[size().B * size().H + row];
      pooled.take(1, args.pooled.dtype, [&](int64_t) { return row_of(args.pooled, row); });
      multiply_along_rows<Arithmetic>(pooled.along(), 1, dpooled.along() + h, 1, words<Arithmetic>(size().D),
                                      heads.mean + h, 1);
    }
  }

  const AttentionPoolSizes& size() const { return args.inputs.size; }

  void take(const RowOperand<Arithmetic>& tokens) const {
    const int64_t count = tokens.count(), depth = words<Arithmetic>(size().D);
    multiply_along_rows<Arithmetic>(tokens.along(), count, query.along(), size().H, depth, dscores, stride);
    multiply_along_rows<Arithmetic>(tokens.along(), count, dpooled.along(), size().H, depth, weights, stride);
    const Timed timed(Work::activations);
    for (int64_t i = 0; i < count * stride; i += kLanes) {
      const int64_t h = i % stride;
      const Vec score = args.inputs.scale * load(dscores + i), dweight = load(weights + i);
      const Vec weight = exp_nonpositive(score - load(heads.best + h)) * load(heads.factor + h);
      store(dscores + i, weight * ((dweight - load(heads.mean + h)) - load(heads.rest + h)));
      store(weights + i, weight);
    }
  }
};

// A split's share of `rest`, for samples that have a concentrated head: the sum of dscores is zero but for it.
template <class Arithmetic>
struct AttentionPoolRestSplit {
  const AttentionPoolBackward& args;
  const AttentionPoolWork& work;

  void operator()(const AttentionPoolSplit& split, float* kept, float* scratch) const {
    const int64_t H = work.size.H;
    const float* totals = args.statistics + (work.size.B + split.sample) * H;
    if (std::none_of(totals, totals + H, is_concentrated)) return;
    const AttentionPoolScores<Arithmetic> scores(args, split.sample, scratch);
    float* const total = AttentionPoolSums(work, kept).total;
    std::fill(total, total + scores.stride, 0.0f);
    split.for_each_tile<Arithmetic>(args.inputs, scores.tokens_scratch, [&](int64_t, const auto& tokens) {
      scores.take(tokens);
      for (int64_t t = 0; t < tokens.count(); ++t) {
        for (int64_t h = 0; h < H; ++h) total[h] += scores.dscores[t * scores.stride + h];
      }
    });
  }
};

struct AttentionPoolRestFinish {
  const AttentionPoolBackward& args;
  const AttentionPoolWork& work;
  float* rests;  // [B * H], zeros

  void operator()(int64_t sample, int64_t head, float* kept) const {
    const int64_t row = sample * work.size.H + head;
    if (!is_concentrated(args.statistics[work.size.B * work.size.H + row])) return;
    float& rest = rests[row];
    for (int64_t i = 0; i < work.splits; ++i) rest += AttentionPoolSums(work, kept, i).total[head];
  }
};

// From the tokens of one split to their rows of dvisual and their share of dquery:
//   dvisual = scale * dscores query + w dpooled, and dquery = scale * dscores^T visual.
template <class Arithmetic>
struct AttentionPoolBackwardSplit {
  const AttentionPoolBackward& args;
  const AttentionPoolWork& work;
  const float* rests;  // [B * H]

  int64_t scratch_floats() const {
    return AttentionPoolScores<Arithmetic>::scratch_floats(work.size) + kTokensPerTile * heads_width(work.size.H);
  }

  void operator()(const AttentionPoolSplit& split, float* kept, float* scratch) const {
    const auto [B, N, D, H] = work.size;
    const AttentionPoolScores<Arithmetic> scores(args, split.sample, scratch);
    std::copy_n(rests + split.sample * H, H, scores.heads.rest);
    float* const transposed = scratch + AttentionPoolScores<Arithmetic>::scratch_floats(work.size);
    const AttentionPoolSums sums(work, kept);
    std::fill(sums.rows, sums.rows + H * spread_width(D), 0.0f);
    if (args.dvisual.data) clear_absent(split);
    split.for_each_tile<Arithmetic>(args.inputs, scores.tokens_scratch, [&](int64_t first, const auto& tokens) {
      scores.take(tokens);
      const int64_t count = tokens.count();
      for (int64_t i = 0; i < count * scores.stride; i += kLanes) {
        store(scores.dscores + i, args.inputs.scale * load(scores.dscores + i));
      }
      if (args.dquery) add_query_share(scores, tokens, transposed, sums.rows);
      if (args.dvisual.data) store_token_gradients(scores, count, split.tokens + first);
    });
  }

  void add_query_share(const AttentionPoolScores<Arithmetic>& scores, const RowOperand<Arithmetic>& tokens,
                       float* transposed, float* sums) const {
    const auto [B, N, D, H] = work.size;
    const Left left = transposed_left<Arithmetic>(scores.dscores, tokens.count(), scores.stride, transposed);
    multiply_across_rows<Arithmetic>(H, D, {RowProduct{left, words<Arithmetic>(tokens.count()), tokens.across()}},
                                     AddFloats{sums, spread_width(D)});
  }

  void store_token_gradients(const AttentionPoolScores<Arithmetic>& scores, int64_t count,
                             const int64_t* tokens) const {
    const int64_t D = work.size.D, stride = scores.stride, depth = words<Arithmetic>(work.size.H);
    const RowProduct products[] = {
        {Arithmetic::values_as_left(scores.dscores, count, stride), depth, scores.query.across()},
        {Arithmetic::values_as_left(scores.weights, count, stride), depth, scores.dpooled.across()}};
    with_elements(args.dvisual.dtype, [&](auto elements) {
      multiply_across_rows<Arithmetic>(count, D, products,
                                       StoreTokens<decltype(elements)>{dvisual_of(scores.sample), D, tokens});
    });
  }

  char* dvisual_of(int64_t sample) const { return row_of(args.dvisual, sample * work.size.N, work.size.D); }

  void clear_absent(const AttentionPoolSplit& split) const {
    const int64_t bytes = work.size.D * size_of(args.dvisual.dtype);
    for (int64_t n = split.begin, i = 0; n < split.end; ++n) {
      const bool takes_part = i < split.count && split.tokens[i] == n;
      if (!takes_part) std::memset(dvisual_of(split.sample) + n * bytes, 0, bytes);
      i += takes_part;
    }
  }
};

// From the shares of a sample's splits to one head's row of dquery.
struct AttentionPoolBackwardFinish {
  const AttentionPoolBackward& args;
  const AttentionPoolWork& work;

  void operator()(int64_t sample, int64_t head, float* kept) const {
    if (!args.dquery) return;
    const int64_t D = work.size.D;
    float* target = args.dquery + (sample * work.size.H + head) * D;
    for (int64_t d = 0; d < D; d += kLanes) {
      Vec value = {};
      for (int64_t i = 0; i < work.splits; ++i) {
        value += load(AttentionPoolSums(work, kept, i).rows + head * spread_width(D) + d);
      }
      Floats::store_part(target + d, value, D - d);
    }
  }
};

template <class Arithmetic>
inline void attention_pool_backward_by(const AttentionPoolBackward& args, ParallelFor parallel_for) {
  const AttentionPoolWork work(args.inputs.size);
  const auto [B, N, D, H] = args.inputs.size;
  std::vector<float> rests(B * H);
  const float* totals = args.statistics + B * H;
  if (std::any_of(totals, totals + B * H, is_concentrated)) {
    work.run(args.inputs, AttentionPoolScores<Arithmetic>::scratch_floats(work.size), parallel_for,
             AttentionPoolRestSplit<Arithmetic>{args, work}, AttentionPoolRestFinish{args, work, rests.data()});
  }
  const AttentionPoolBackwardSplit<Arithmetic> take{args, work, rests.data()};
  work.run(args.inputs, take.scratch_floats(), parallel_for, take, AttentionPoolBackwardFinish{args, work});
}

inline void attention_pool_backward(const AttentionPoolBackward& args, ParallelFor parallel_for) {
  const Timed timed(Work::rest);
#ifdef PETL_BFLOAT16_PRODUCTS
  if (takes_pairs(args.inputs)) return attention_pool_backward_by<PairArithmetic>(args, parallel_for);
#endif
  attention_pool_backward_by<FloatArithmetic>(args, parallel_for);
}
