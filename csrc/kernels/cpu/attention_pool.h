// Attention pooling on the CPU. Whatever the tensors are, arithmetic is float32.
// No include guard: each path includes it once, inside its own namespace (see path.h).
//
// Tokens are read where they lie, row by row: both products with them need no packing, since one runs along their rows
// and the other takes them as its right operand.

// Tokens that one thread takes at a time: their rows stay in the second-level cache from one product to the next.
constexpr int64_t kTokensPerTile = 64;
// A sample's tokens are shared out in so many at most. What comes of it depends on N alone, and the parts are combined
// in order: so neither the number of threads nor the other samples change a result.
constexpr int64_t kTokensPerSplit = 128;
// The splits' sums of so many floats are kept at a time, or those of one sample.
constexpr int64_t kFloatsPerGroup = int64_t{1} << 20;

// Rows of float32 in whole vectors lie so far apart: an odd number of cache lines, since rows of 1024 floats would all
// want the same few places in the cache.
inline int64_t spread_width(int64_t D) { return round_up(D, 32) + 16; }

// The heads' values of one token, in whole vectors.
inline int64_t heads_width(int64_t H) { return round_up(H, kLanes); }

template <int kBytes>
struct FloatsOf {
  typedef float Type __attribute__((vector_size(kBytes)));
};

// Of so many bytes of floats, halves added to halves.
template <int kBytes>
inline float sum_by_halves(const void* values) {
  if constexpr (kBytes == sizeof(float)) {
    return read<float>(values);
  } else {
    using Half = typename FloatsOf<kBytes / 2>::Type;
    const Half sum = read<Half>(values) + read<Half>(static_cast<const char*>(values) + kBytes / 2);
    return sum_by_halves<kBytes / 2>(&sum);
  }
}

// products[token * stride + head] = tokens[token] . heads[head], for rows of D floats; those of the heads are `width`
// floats apart, with zeros up to whole vectors.
template <int kTokens, int kHeads>
__attribute__((noinline)) void multiply_rows(const float* const* tokens, const float* heads, int64_t width, int64_t D,
                                             float* products, int64_t stride) {
  Vec sum[kTokens][kHeads] = {};
  const auto add = [&](int64_t d, int64_t count) {
    Vec value[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) value[t] = Floats::load_part(tokens[t] + d, count);
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      const Vec head = load(heads + h * width + d);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) sum[t][h] += value[t] * head;
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) add(d, kLanes);
  if (d < D) add(d, D - d);
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHeads; ++h) products[t * stride + h] = sum_by_halves<PETL_VECTOR_BYTES>(&sum[t][h]);
  }
}

using MultiplyRows = void (*)(const float* const* tokens, const float* heads, int64_t width, int64_t D, float* products,
                              int64_t stride);

template <int kTokens, int... kHead>
constexpr std::array<MultiplyRows, sizeof...(kHead)> multiply_rows_by_heads(std::integer_sequence<int, kHead...>) {
  return {multiply_rows<kTokens, kHead + 1>...};
}

// The rows of a tile of tokens in float32.
struct TokenRows {
  const float* rows[kTokensPerTile];
  int64_t count;
};

// products [count, heads_width(H)] = tokens heads^T
inline void multiply_tokens(const TokenRows& tokens, const float* heads, int64_t D, int64_t H, float* products) {
  constexpr std::make_integer_sequence<int, kTileRows> kHeads;
  constexpr auto kSeveral = multiply_rows_by_heads<kPanelVectors>(kHeads), kOne = multiply_rows_by_heads<1>(kHeads);
  const int64_t width = spread_width(D), stride = heads_width(H);
  for (int64_t t = 0; t < tokens.count;) {
    const bool several = t + kPanelVectors <= tokens.count;
    for (int64_t h = 0; h < H; h += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, H - h);
      (several ? kSeveral : kOne)[count - 1](tokens.rows + t, heads + h * width, width, D, products + t * stride + h,
                                             stride);
    }
    t += several ? kPanelVectors : 1;
  }
}

// sums [kRows, kVectors] += left * right, where row k of `right` is rows[k], from its element `column` on. The one
// vector of kVectors = 1 may be the last of its row, with `count` elements.
template <int kRows, int kVectors>
__attribute__((noinline)) void accumulate_rows(Left left, int64_t depth, const float* const* rows, int64_t column,
                                               int64_t count, Sums& sums) {
  Vec sum[kRows][kVectors] = {};
  const float* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.step) {
    const float* row = rows[k] + column;
    Vec b[kVectors];
    if constexpr (kVectors == 1) {
      b[0] = Floats::load_part(row, count);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) b[v] = load(row + v * kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = broadcast(a + m * left.row);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] += factor * b[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[m * kVectors + v] += sum[m][v];
  }
}

using AccumulateRows = void (*)(Left left, int64_t depth, const float* const* rows, int64_t column, int64_t count,
                                Sums& sums);

template <int kVectors, int... kRow>
constexpr std::array<AccumulateRows, sizeof...(kRow)> accumulate_rows_by_rows(std::integer_sequence<int, kRow...>) {
  return {accumulate_rows<kRow + 1, kVectors>...};
}

// A product whose right operand's rows lie anywhere.
struct RowProduct {
  Left left;
  const float* const* rows;
  int64_t depth;
};

// The sum of the products, [rows, D], to an epilogue as those of gemm.h; only the last vector of a row may be a part.
template <size_t kProducts, class Epilogue>
inline void multiply_rows_of(int64_t rows, int64_t D, const RowProduct (&products)[kProducts],
                             const Epilogue& epilogue) {
  constexpr std::make_integer_sequence<int, kTileRows> kRows;
  constexpr auto kPanel = accumulate_rows_by_rows<kPanelVectors>(kRows), kVector = accumulate_rows_by_rows<1>(kRows);
  for (int64_t column = 0; column < D;) {
    const bool whole = column + kPanelVectors * kLanes <= D;
    const int vectors = whole ? kPanelVectors : 1;
    for (int64_t begin = 0; begin < rows; begin += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - begin);
      Sums sums = {};
      for (const RowProduct& product : products) {
        const Left left{product.left.data + begin * product.left.row, product.left.row, product.left.step};
        (whole ? kPanel : kVector)[count - 1](left, product.depth, product.rows, column, D - column, sums);
      }
      for (int64_t m = 0; m < count; ++m) {
        for (int v = 0; v < vectors; ++v) epilogue(begin + m, column + v * kLanes, sums[m * vectors + v]);
      }
    }
    column += vectors * kLanes;
  }
}

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
  template <class Tile>
  void for_each_tile_of(const AttentionPoolInputs& args, float* wide, const Tile& tile) const {
    const int64_t tiles = round_up(count, kTokensPerTile) / kTokensPerTile;
    for (int64_t i = 0, first = 0; i < tiles; ++i) {
      const int64_t end = std::min(count, round_up(count * (i + 1) / tiles, kPanelVectors));
      tile(first, rows_of(args, first, end, wide));
      first = end;
    }
  }

 private:
  // Where they lie, or widened into `wide` [kTokensPerTile, spread_width(D)].
  TokenRows rows_of(const AttentionPoolInputs& args, int64_t first, int64_t end, float* wide) const {
    const int64_t D = args.size.D, size = size_of(args.visual.dtype);
    const ConstRows visual{static_cast<const char*>(args.visual.data) + sample * args.visual_sample * size,
                           args.visual.stride, args.visual.dtype};
    TokenRows found;
    found.count = end - first;
    for (int64_t t = 0; t < found.count; ++t) {
      const char* row = row_of(visual, tokens[first + t]);
      float* copy = wide + t * spread_width(D);
      const bool is_wide = visual.dtype == DType::float32;
      if (!is_wide) widen_row({row, 0, visual.dtype}, D, copy);
      found.rows[t] = is_wide ? reinterpret_cast<const float*>(row) : copy;
    }
    return found;
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

// The rows of a sample's heads [H, D], widened to [H, spread_width(D)] with zeros up to whole vectors.
inline void widen_heads(const ConstRows& source, int64_t sample, const AttentionPoolSizes& size, float* target) {
  for (int64_t h = 0; h < size.H; ++h) {
    const char* row = row_of(source, sample * size.H + h);
    widen_row({row, 0, source.dtype}, size.D, target + h * spread_width(size.D));
  }
}

// From the tokens of one split to their weighted sums.
struct AttentionPoolForwardSplit {
  const AttentionPoolForward& args;
  const AttentionPoolWork& work;

  int64_t scratch_floats() const {
    const auto [B, N, D, H] = work.size;
    return (H + kTokensPerTile) * spread_width(D) + (kTokensPerTile + 1) * heads_width(H);
  }

  void operator()(const AttentionPoolSplit& split, float* kept, float* scratch) const {
    const int64_t D = work.size.D, H = work.size.H, width = spread_width(D), stride = heads_width(H);
    float *query = scratch, *wide = query + H * width, *scores = wide + kTokensPerTile * width;
    float* rescale = scores + kTokensPerTile * stride;
    const AttentionPoolSums sums(work, kept);
    widen_heads(args.inputs.query, split.sample, work.size, query);
    std::fill(scores, scores + kTokensPerTile * stride, 0.0f);
    std::fill(sums.rows, sums.rows + H * width, 0.0f);
    std::fill(sums.best, sums.best + stride, -INFINITY);
    std::fill(sums.total, sums.total + stride, 0.0f);
    split.for_each_tile_of(args.inputs, wide, [&](int64_t, const TokenRows& tokens) {
      multiply_tokens(tokens, query, D, H, scores);
      weigh(tokens.count, scores, sums, rescale);
      multiply_rows_of(H, D, {RowProduct{{scores, 1, stride}, tokens.rows, tokens.count}},
                       RescaleAndAdd{sums.rows, width, rescale});
    });
  }

  // The products of `count` tokens with the queries become weights relative to the greatest score so far; by `rescale`
  // the sums over the tokens before are to be multiplied.
  void weigh(int64_t count, float* scores, const AttentionPoolSums& sums, float* rescale) const {
    const int64_t stride = heads_width(work.size.H);
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

inline void attention_pool_forward(const AttentionPoolForward& args, ParallelFor parallel_for) {
  const AttentionPoolWork work(args.inputs.size);
  const AttentionPoolForwardSplit take{args, work};
  work.run(args.inputs, take.scratch_floats(), parallel_for, take, AttentionPoolForwardFinish{args, work});
}

// What backward knows of each head of a sample before it sees a token; each is [heads_width(H)].
struct AttentionPoolHeads {
  float* best;    // the greatest score
  float* factor;  // 1 / the sum of exp(score - best)
  float* mean;    // dpooled . pooled, the mean of visual dpooled^T by the weights

  AttentionPoolHeads(float* memory, int64_t stride) : best(memory), factor(best + stride), mean(factor + stride) {}
};

// From the tokens of one split to their rows of dvisual and their share of dquery. With dw = visual dpooled^T,
//   ds = scale * w * (dw - sum_n(w dw)), where the sum is dpooled . pooled,
//   dvisual = ds query + w dpooled, and dquery = ds^T visual.
struct AttentionPoolBackwardSplit {
  const AttentionPoolBackward& args;
  const AttentionPoolWork& work;

  int64_t scratch_floats() const {
    const auto [B, N, D, H] = work.size;
    return (2 * H + kTokensPerTile) * spread_width(D) + (2 * kTokensPerTile + 3) * heads_width(H);
  }

  void operator()(const AttentionPoolSplit& split, float* kept, float* scratch) const {
    const int64_t D = work.size.D, H = work.size.H, width = spread_width(D), stride = heads_width(H);
    float *query = scratch, *dpooled = query + H * width, *wide = dpooled + H * width;
    float *dscores = wide + kTokensPerTile * width, *weights = dscores + kTokensPerTile * stride;
    const AttentionPoolHeads heads(weights + kTokensPerTile * stride, stride);
    std::fill(dscores, heads.mean + stride, 0.0f);
    widen_heads(args.inputs.query, split.sample, work.size, query);
    widen_heads(args.dpooled, split.sample, work.size, dpooled);
    summarise_heads(split.sample, dpooled, wide, heads);
    std::vector<const float*> query_rows(H), dpooled_rows(H);
    for (int64_t h = 0; h < H; ++h) query_rows[h] = query + h * width, dpooled_rows[h] = dpooled + h * width;
    const AttentionPoolSums sums(work, kept);
    std::fill(sums.rows, sums.rows + H * width, 0.0f);
    if (args.dvisual.data) clear_absent(split);
    split.for_each_tile_of(args.inputs, wide, [&](int64_t first, const TokenRows& tokens) {
      multiply_tokens(tokens, query, D, H, dscores);
      multiply_tokens(tokens, dpooled, D, H, weights);
      score_gradients(tokens.count, heads, dscores, weights);
      if (args.dquery) {
        multiply_rows_of(H, D, {RowProduct{{dscores, 1, stride}, tokens.rows, tokens.count}},
                         AddFloats{sums.rows, width});
      }
      if (args.dvisual.data) {
        const RowProduct products[] = {{{dscores, stride, 1}, query_rows.data(), H},
                                       {{weights, stride, 1}, dpooled_rows.data(), H}};
        with_elements(args.dvisual.dtype, [&](auto elements) {
          multiply_rows_of(tokens.count, D, products,
                           StoreTokens<decltype(elements)>{dvisual_of(split.sample), D, split.tokens + first});
        });
      }
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

  // The mean is summed as the products with the tokens are: where one token has all the weight, they are equal.
  void summarise_heads(int64_t sample, const float* dpooled, float* wide, const AttentionPoolHeads& heads) const {
    const auto [B, N, D, H] = work.size;
    for (int64_t h = 0; h < H; ++h, dpooled += spread_width(D)) {
      const int64_t row = sample * H + h;
      heads.best[h] = args.statistics[row];
      heads.factor[h] = 1 / args.statistics[B * H + row];
      widen_row({row_of(args.pooled, row), 0, args.pooled.dtype}, D, wide);
      const float* const pooled = wide;
      multiply_rows<1, 1>(&pooled, dpooled, 0, D, heads.mean + h, 1);
    }
  }

  // The products with the queries become dscores, and those with dpooled the weights.
  void score_gradients(int64_t count, const AttentionPoolHeads& heads, float* dscores, float* weights) const {
    const int64_t stride = heads_width(work.size.H);
    const float scale = args.inputs.scale;
    for (int64_t i = 0; i < count * stride; i += kLanes) {
      const int64_t h = i % stride;
      const Vec score = scale * load(dscores + i), dweight = load(weights + i);
      const Vec weight = exp_nonpositive(score - load(heads.best + h)) * load(heads.factor + h);
      store(dscores + i, scale * weight * (dweight - load(heads.mean + h)));
      store(weights + i, weight);
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

inline void attention_pool_backward(const AttentionPoolBackward& args, ParallelFor parallel_for) {
  const AttentionPoolWork work(args.inputs.size);
  const AttentionPoolBackwardSplit take{args, work};
  work.run(args.inputs, take.scratch_floats(), parallel_for, take, AttentionPoolBackwardFinish{args, work});
}
