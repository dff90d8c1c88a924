// Attention pooling on the CPU. Whatever the tensors are, arithmetic is float32; only where the processor multiplies
// bfloat16 itself, and visual and the query are bfloat16, the factors of products are bfloat16 and their sums float32.
// A part of path.inl.

// Tokens that one thread takes at a time: their rows stay in the second-level cache from one product to the next.
constexpr int64_t kTokensPerTile = 64;
// A sample's tokens are shared out in so many at most. What comes of it depends on N alone, and the parts are combined
// in order: so neither the number of threads nor the other samples change a result.
constexpr int64_t kTokensPerSplit = 128;
// The splits' sums of so many floats are kept at a time, or those of one sample.
constexpr int64_t kFloatsPerGroup = int64_t{1} << 20;

// The heads' values of one token, in any path's and any arithmetic's padded_width.
inline int64_t heads_width(int64_t H) { return round_up(H, 2 * kLanes); }

// Epilogue: target [rows, stride] in float32 becomes factors[row] * target + value.
struct RescaleAndAdd {
  float* target;
  int64_t stride;
  const float* factors;

  void operator()(int64_t row, int64_t column, Vec value) const {
    float* at = target + row * stride + column;
    store(at, factors[row] * load(at) + value);
  }
};

// One split of a sample: its tokens that take part, in order.
struct AttentionPoolSplit {
  int64_t sample, begin, end;
  int64_t tokens[kTokensPerSplit];
  int64_t count = 0;

  AttentionPoolSplit(const AttentionPoolInputs& args, int64_t sample, int64_t begin, int64_t end)
      : sample(sample), begin(begin), end(end) {
    const uint8_t* mask = args.mask ? args.mask + sample * args.size.N : nullptr;
    for (int64_t n = begin; n < end; ++n) {
      if (!mask || mask[n]) tokens[count++] = n;
    }
  }

  // Calls tile(first, rows) for tiles as even as they can be, of whole blocks of the products where that is possible.
  // `scratch` holds kTokensPerTile rows of spread_width(D).
  template <class Arithmetic, class Tile>
  void for_each_tile(const AttentionPoolInputs& args, float* scratch, const Tile& tile) const {
    RowOperand<Arithmetic> rows(kTokensPerTile, args.size.D, scratch);
    const int64_t tiles = round_up(count, kTokensPerTile) / kTokensPerTile, size = size_of(args.visual.dtype);
    const char* visual = static_cast<const char*>(args.visual.data) + sample * args.visual_sample * size;
    for (int64_t i = 0, first = 0; i < tiles; ++i) {
      const int64_t end = std::min(count, round_up(count * (i + 1) / tiles, kPanelVectors));
      rows.take(end - first, args.visual.dtype,
                [&](int64_t t) { return visual + tokens[first + t] * args.visual.stride * size; });
      tile(first, rows);
      first = end;
    }
  }
};

// How the samples' tokens are shared out: in splits, and in groups of samples whose splits' sums are kept at a time.
struct AttentionPoolWork {
  AttentionPoolSizes size;
  int64_t splits, group;

  explicit AttentionPoolWork(const AttentionPoolSizes& size)
      : size(size),
        splits(round_up(size.N, kTokensPerSplit) / kTokensPerSplit),
        group(std::max<int64_t>(1, std::min(size.B, kFloatsPerGroup / (splits * floats_per_split())))) {}

  // A row of sums for each head, and two more numbers: the greatest score and the sum of the weights.
  int64_t floats_per_split() const { return size.H * spread_width(size.D) + 2 * heads_width(size.H); }

  // Calls take(split, its floats, the thread's scratch memory) for each split, then finish(sample, head, the floats of
  // the sample's first split) for each head, both possibly on several threads.
  template <class Take, class Finish>
  void run(const AttentionPoolInputs& args, int64_t scratch_floats, ParallelFor parallel_for, const Take& take,
           const Finish& finish) const {
    float* kept = call_scratch().reserve(group * splits * floats_per_split());
    for (int64_t begin = 0; begin < size.B; begin += group) {
      const int64_t samples = std::min(group, size.B - begin);
      parallel_for(samples * splits, [&](int64_t first, int64_t last) {
        float* scratch = tile_scratch().reserve(scratch_floats);
        for (int64_t i = first; i < last; ++i) {
          take(split_of(args, begin + i / splits, i % splits), kept + i * floats_per_split(), scratch);
        }
        tile_scratch().release_excess();
      });
      parallel_for(samples * size.H, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          finish(begin + i / size.H, i % size.H, kept + i / size.H * splits * floats_per_split());
        }
      });
    }
    call_scratch().release_excess();
  }

 private:
  AttentionPoolSplit split_of(const AttentionPoolInputs& args, int64_t sample, int64_t split) const {
    return {args, sample, size.N * split / splits, size.N * (split + 1) / splits};
  }
};

// What is kept of one split.
struct AttentionPoolSums {
  float* rows;   // [H, spread_width(D)]
  float* best;   // [heads_width(H)], the greatest scores
  float* total;  // the same, of exp(score - best)

  AttentionPoolSums(const AttentionPoolWork& work, float* kept, int64_t split = 0)
      : rows(kept + split * work.floats_per_split()),
        best(rows + work.size.H * spread_width(work.size.D)),
        total(best + heads_width(work.size.H)) {}
};

// The rows of a sample's heads.
template <class Arithmetic>
inline RowOperand<Arithmetic> heads_of(const ConstRows& source, int64_t sample, const AttentionPoolSizes& size,
                                       float* scratch) {
  RowOperand<Arithmetic> heads(size.H, size.D, scratch);
  heads.take(size.H, source.dtype, [&](int64_t h) { return row_of(source, sample * size.H + h); });
  return heads;
}

// values [rows, stride] as a left operand whose depth runs over the rows; `scratch` holds as many.
template <class Arithmetic>
inline Left transposed_left(const float* values, int64_t rows, int64_t stride, float* scratch) {
  if (Arithmetic::kPerWord == 1) return {values, 1, stride};
  gather<Arithmetic>(values, rows, stride, scratch);
  return {scratch, 1, stride};
}

// From the tokens of one split to their weighted sums.
template <class Arithmetic>
struct AttentionPoolForwardSplit {
  const AttentionPoolForward& args;
  const AttentionPoolWork& work;

  int64_t scratch_floats() const {
    const auto [B, N, D, H] = work.size;
    return (H + kTokensPerTile) * spread_width(D) + (2 * kTokensPerTile + 1) * heads_width(H);
  }

  void operator()(const AttentionPoolSplit& split, float* kept, float* scratch) const {
    const int64_t D = work.size.D, H = work.size.H, width = spread_width(D), stride = padded_width<Arithmetic>(H);
    float *tokens_scratch = scratch + H * width, *scores = tokens_scratch + kTokensPerTile * width;
    float *transposed = scores + kTokensPerTile * stride, *rescale = transposed + kTokensPerTile * stride;
    const AttentionPoolSums sums(work, kept);
    std::fill(scores, scores + kTokensPerTile * stride, 0.0f);
    std::fill(sums.rows, sums.rows + H * width, 0.0f);
    std::fill(sums.best, sums.best + stride, -INFINITY);
    std::fill(sums.total, sums.total + stride, 0.0f);
    const auto query = heads_of<Arithmetic>(args.inputs.query, split.sample, work.size, scratch);
    split.for_each_tile<Arithmetic>(args.inputs, tokens_scratch, [&](int64_t, const auto& tokens) {
      const int64_t count = tokens.count();
      multiply_along_rows<Arithmetic>(tokens.along(), count, query.along(), H, words<Arithmetic>(D), scores, stride);
      weigh(count, scores, sums, rescale);
      const Left weights = transposed_left<Arithmetic>(scores, count, stride, transposed);
      multiply_across_rows<Arithmetic>(H, D, {RowProduct{weights, words<Arithmetic>(count), tokens.across()}},
                                       RescaleAndAdd{sums.rows, width, rescale});
    });
  }

  // The products of `count` tokens with the queries become weights relative to the greatest score so far; by `rescale`
  // the sums over the tokens before are to be multiplied.
  void weigh(int64_t count, float* scores, const AttentionPoolSums& sums, float* rescale) const {
    const Timed timed(Work::activations);
    const int64_t stride = padded_width<Arithmetic>(work.size.H);
    for (int64_t h = 0; h < stride; h += kLanes) {
      const Vec before = load(sums.best + h);
      Vec best = before, total = {};
      for (int64_t t = 0; t < count; ++t) {
        const Vec score = args.inputs.scale * load(scores + t * stride + h);
        store(scores + t * stride + h, score);
        best = best < score ? score : best;
      }
      for (int64_t t = 0; t < count; ++t) {
        const Vec weight = exp_nonpositive(load(scores + t * stride + h) - best);
        store(scores + t * stride + h, weight);
        total += weight;
      }
      const Vec factor = exp_nonpositive(before - best);
      store(rescale + h, factor);
      store(sums.best + h, best);
      store(sums.total + h, factor * load(sums.total + h) + total);
    }
  }
};

// From the sums of a sample's splits to one head's pooled row.
struct AttentionPoolForwardFinish {
  const AttentionPoolForward& args;
  const AttentionPoolWork& work;

  void operator()(int64_t sample, int64_t head, float* kept) const {
    const int64_t D = work.size.D, row = sample * work.size.H + head;
    float best = -INFINITY, total = 0;
    for (int64_t i = 0; i < work.splits; ++i) best = std::max(best, AttentionPoolSums(work, kept, i).best[head]);
    for (int64_t i = 0; i < work.splits; ++i) {
      const AttentionPoolSums sums(work, kept, i);
      // From here on it is the factor of this split's sums.
      sums.best[head] = std::exp(sums.best[head] - best);
      total += sums.best[head] * sums.total[head];
    }
    args.statistics[row] = best;
    args.statistics[work.size.B * work.size.H + row] = total;
    with_elements(args.pooled.dtype, [&](auto elements) {
      char* target = row_of(args.pooled, row, D);
      for (int64_t d = 0; d < D; d += kLanes) {
        Vec value = {};
        for (int64_t i = 0; i < work.splits; ++i) {
          const AttentionPoolSums sums(work, kept, i);
          value += sums.best[head] * load(sums.rows + head * spread_width(D) + d);
        }
        elements.store_part(target + d * elements.kBytes, value / total, D - d);
      }
    });
  }
};

template <class Arithmetic>
inline void attention_pool_forward_by(const AttentionPoolForward& args, ParallelFor parallel_for) {
  const AttentionPoolWork work(args.inputs.size);
  const AttentionPoolForwardSplit<Arithmetic> take{args, work};
  work.run(args.inputs, take.scratch_floats(), parallel_for, take, AttentionPoolForwardFinish{args, work});
}

#ifdef PETL_BFLOAT16_PRODUCTS
// A query in another dtype is not rounded.
inline bool takes_pairs(const AttentionPoolInputs& args) {
  return !PairArithmetic::rounds(args.visual.dtype) && !PairArithmetic::rounds(args.query.dtype) &&
         args.size.D % 2 == 0;
}
#endif

inline void attention_pool_forward(const AttentionPoolForward& args, ParallelFor parallel_for) {
  const Timed timed(Work::rest);
#ifdef PETL_BFLOAT16_PRODUCTS
  if (takes_pairs(args.inputs)) return attention_pool_forward_by<PairArithmetic>(args, parallel_for);
#endif
  attention_pool_forward_by<FloatArithmetic>(args, parallel_for);
}
