// Attention pooling on CUDA. A block of threads takes kTokens tokens of one sample: their products with the queries,
// the part of the softmax that is theirs, and the tokens' sums by these weights, for which it reads them again while
// they are in the second-level cache. Forward is two launches, the blocks and their combination in order; backward one
// more before them, and the second only where the queries need a gradient.
#include "kernels/cuda/attention_pool.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/product.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {
namespace {

constexpr int kThreads = 128, kWarps = 4, kTokens = 16 * kWarps;
// The tokens meet the queries by chunks of this many columns, of which some are on their way or in use.
constexpr int kChunk = 32, kStages = 4;
// Blocks that a multiprocessor shall be able to run at once: a bound for the compiler's use of registers.
constexpr int kResidentBlocks = 2;
// Sums of tokens, and the tokens' gradients, are made by so many columns at a time.
constexpr int kColumns = 128;

// What a block knows of its sample.
template <class T>
struct PoolProblem {
  const T* visual;  // [B, N, D]
  int64_t visual_sample, visual_stride;
  const uint8_t* mask;  // [B, N]; null: all tokens take part
  Weights query;        // [B * H, D]
  float scale;
  int N, D, H, splits;
};

template <class T>
struct PoolForwardTask {
  PoolProblem<T> problem;
  float* sums;   // [B, splits, H, D]
  float* best;   // [B, splits, H], the greatest scores
  float* total;  // the same, of exp(score - best)
};

template <class T>
struct PoolBackwardTask {
  PoolProblem<T> problem;
  Weights dpooled;            // [B * H, D]
  const float *best, *total;  // [B * H]
  float* mean;                // [B * H], dpooled . pooled
  float* rests;               // [B, splits, H], shares of what rounding left out of it; only of samples that
                              // have a concentrated head
  T* dvisual;                 // [B, N, D]; null: not needed
  float* sums;                // [B, splits, H, D]; null: not needed
};

// Where one token has most of a head's weight, its product with dpooled is nearly the mean, and of their difference, on
// which the gradients depend, rounding leaves little. Of such heads the mean is corrected, for which the sample's
// tokens are read once more. The greatest weight is 1 / total, the sum of exp(score - best).
__device__ __forceinline__ bool is_concentrated(float total) { return total < 2; }

template <class T, int kGroups>
class PoolBlock {
 public:
  static constexpr int kHeads = 32 * kGroups;
  static constexpr int kPadding = 16 / sizeof(T);
  using Scores = Sums<1, kGroups>;
  using QueryStage = WeightStage<T, Order::columns, kChunk, kHeads, kThreads>;
  using HeadStage = WeightStage<T, Order::depth, 32, kColumns, kThreads>;

  static constexpr int kLeftStride = kChunk + kPadding, kLeftElements = kTokens * kLeftStride;
  // Weights of the tokens as a left operand of their sums, [kHeads, kTokens], and of their gradients, of two kinds.
  static constexpr int kByHeadStride = kTokens + kPadding, kByHeadElements = kHeads * kByHeadStride;
  static constexpr int kByTokenStride = 2 * kHeads + kPadding, kByTokenElements = kTokens * kByTokenStride;
  static constexpr int kTileStride = kColumns + kPadding, kTileElements = kTokens * kTileStride;

  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  static constexpr int kScratchBytes = kWarps * kHeads * sizeof(float);
  // The products with kProducts operands come first; what follows takes their place.
  template <int kProducts>
  static constexpr int kFirstElements = kStages * kLeftElements + 2 * kProducts * QueryStage::kElements;
  static constexpr int kForwardElements = kByHeadElements + 2 * kTileElements;
  static constexpr int kBackwardElements =
      kByHeadElements + kByTokenElements + larger(2 * kTileElements, 2 * HeadStage::kElements);
  static constexpr int kForwardBytes = kScratchBytes + larger(kFirstElements<1>, kForwardElements) * sizeof(T);
  static constexpr int kMeansBytes = kScratchBytes + kFirstElements<2> * sizeof(T);
  static constexpr int kBackwardBytes = kScratchBytes + larger(kFirstElements<2>, kBackwardElements) * sizeof(T);

  __device__ __forceinline__ PoolBlock(const PoolProblem<T>& problem, int64_t sample, int split)
      : problem_(problem),
        sample_(sample),
        first_(split * kTokens),
        visual_(problem.visual + sample_ * problem.visual_sample),
        mask_(problem.mask ? problem.mask + sample_ * problem.N : nullptr),
        scratch_(reinterpret_cast<float*>(shared_memory())),
        tiles_(reinterpret_cast<T*>(shared_memory() + kScratchBytes)) {}

  __device__ __forceinline__ void forward(const PoolForwardTask<T>& task) {
    LongScores sums[1];
    const Weights operands[1] = {of_sample(problem_.query)};
    first_products(sums, operands);
    float best[kGroups][8], total[kGroups][8];
    weigh(sums[0].finish(), best, total);
    const int64_t begin = int64_t{blockIdx.x} * problem_.H;
    for_own_heads([&](int group, int i, int head) {
      task.best[begin + head] = best[group][i];
      task.total[begin + head] = total[group][i];
    });
    sum_tokens(task.sums + begin * problem_.D);
  }

  // Of a problem whose tokens are the pooled rows, and whose queries the gradients dpooled: the products of each head
  // with its own become its mean.
  __device__ __forceinline__ void find_means() {
    LongScores sums[1];
    const Weights operands[1] = {of_sample(problem_.query)};
    first_products(sums, operands);
    const Scores& products = sums[0].finish();
    for_each_product([&](int group, int line, bool present) {
      float values[8];
      products.get(group, line, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int head = head_of(group) + i;
        if (present && head == token_of(line)) of_head(HeadValue::mean, head) = values[i];
      }
    });
    __syncthreads();
  }

  __device__ __forceinline__ void store_means(float* mean) const {
    const int head = static_cast<int>(threadIdx.x);
    if (head < problem_.H) mean[sample_ * problem_.H + head] = of_head(HeadValue::mean, head);
  }

  __device__ __forceinline__ bool has_concentrated_head(const float* total) const {
    bool has = false;
    for (int head = 0; head < problem_.H; ++head) has |= is_concentrated(total[sample_ * problem_.H + head]);
    return has;
  }

  // The block's share of what rounding left out of the means, which find_means has left: the sum of all dscores is
  // zero but for it.
  __device__ __forceinline__ void find_rests(const PoolBackwardTask<T>& task) {
    LongScores sums[2];
    const Weights operands[2] = {of_sample(problem_.query), of_sample(task.dpooled)};
    load_heads(task);
    first_products(sums, operands);
    const Scores &scores = sums[0].finish(), &dweights = sums[1].finish();
    float rest[kGroups][8] = {};
    for_each_product([&](int group, int line, bool present) {
      float weight[8], dscore[8];
      differentiate(scores, dweights, group, line, present, weight, dscore);
#pragma unroll
      for (int i = 0; i < 8; ++i) rest[group][i] += dscore[i];
    });
    reduce_tokens(rest, Add());
    for_own_heads(
        [&](int group, int i, int head) { task.rests[int64_t{blockIdx.x} * problem_.H + head] = rest[group][i]; });
  }

  __device__ __forceinline__ void backward(const PoolBackwardTask<T>& task) {
    LongScores sums[2];
    const Weights operands[2] = {of_sample(problem_.query), of_sample(task.dpooled)};
    load_heads(task);
    load_means(task);
    first_products(sums, operands);
    score_gradients(sums[0].finish(), sums[1].finish());
    __syncthreads();
    if (task.dvisual) token_gradients(task.dvisual + sample_ * problem_.N * problem_.D, operands);
    if (task.sums) sum_tokens(task.sums + int64_t{blockIdx.x} * problem_.H * problem_.D);
  }

 private:
  // Sums of sums where long ones of floats would lose digits; see product.h.
  struct LongScores {
    static constexpr bool kTwoLevels = sizeof(T) == 4;
    Scores sums, totals[1];  // the second is not used, and takes no registers, where there is one level

    __device__ __forceinline__ void clear() {
      sums.clear();
      if constexpr (kTwoLevels) totals[0].clear();
    }
    __device__ __forceinline__ void end_of(int depth) {
      if (kTwoLevels && depth % kShortSum == 0) finish();
    }
    __device__ __forceinline__ Scores& finish() {
      if constexpr (!kTwoLevels) return sums;
      totals[0].add(sums);
      sums.clear();
      return totals[0];
    }
  };

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
  // Where a thread's sums belong: tokens of the block, and the first of eight heads.
  __device__ __forceinline__ static int token_of(int line) { return 16 * warp() + lane() / 4 + 8 * line; }
  __device__ __forceinline__ static int head_of(int group) { return 32 * group + lane() % 4 * 8; }

  __device__ __forceinline__ bool takes_part(int token) const {
    const int n = first_ + token;
    return n < problem_.N && (!mask_ || mask_[n]);
  }

  __device__ __forceinline__ Weights of_sample(Weights weights) const {
    const int64_t bytes = weights.dtype == DType::float32 ? 4 : 2;
    weights.data = static_cast<const char*>(weights.data) + sample_ * problem_.H * weights.stride * bytes;
    return weights;
  }

  // Copies [kTokens, kWidth] of the tokens from `column` on; zeros for what takes no part.
  template <int kWidth>
  __device__ __forceinline__ void copy_tokens(T* tile, int stride, int column) const {
    constexpr int kVectors = kTokens * kWidth / 8;
#pragma unroll
    for (int i = 0; i < kVectors / kThreads; ++i) {
      const int vector = i * kThreads + static_cast<int>(threadIdx.x);
      const int token = vector / (kWidth / 8), offset = vector % (kWidth / 8) * 8;
      const bool valid = takes_part(token) && column + offset < problem_.D;
      const T* source = valid ? visual_ + (first_ + token) * problem_.visual_stride + column + offset : visual_;
#pragma unroll
      for (int j = 0; j < 8; j += 16 / sizeof(T)) copy_async(tile + token * stride + offset + j, source + j, valid);
    }
  }

  // sums[i] = tokens operands[i]^T
  template <int kProducts>
  __device__ __forceinline__ void first_products(LongScores (&sums)[kProducts],
                                                 const Weights (&operands)[kProducts]) const {
    const int chunks = (problem_.D + kChunk - 1) / kChunk;
    const Groups groups{0, 1, (problem_.H + 31) / 32};
    QueryStage stages[kProducts];
    const auto left = [&](int chunk) { return tiles_ + chunk % kStages * kLeftElements; };
    const auto right = [&](int chunk, int i) {
      return tiles_ + kStages * kLeftElements + (chunk % 2 * kProducts + i) * QueryStage::kElements;
    };
    for (int chunk = 0; chunk < kStages - 1; ++chunk) {
      if (chunk < chunks) copy_tokens<kChunk>(left(chunk), kLeftStride, chunk * kChunk);
      commit_copies();
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      stages[i].load(operands[i], 0, 0);
      stages[i].store(operands[i], right(0, i), nullptr);
      sums[i].clear();
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool more = chunk + 1 < chunks;
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        if (more) stages[i].load(operands[i], (chunk + 1) * kChunk, 0);
      }
      wait_for_copies<kStages - 2>();
      __syncthreads();
      // All have done with the chunk before this one: its place is free.
      const int next = chunk + kStages - 1;
      if (next < chunks) copy_tokens<kChunk>(left(next), kLeftStride, next * kChunk);
      commit_copies();
      const Tile<const T> rows{left(chunk) + 16 * warp() * kLeftStride, kLeftStride};
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        multiply<T, Order::columns>(sums[i].sums, rows, Tile<const T>{right(chunk, i), QueryStage::kStride}, nullptr,
                                    groups, kChunk);
        sums[i].end_of((chunk + 1) * kChunk);
        if (more) stages[i].store(operands[i], right(chunk + 1, i), nullptr);
      }
    }
    wait_for_copies<0>();
    __syncthreads();
  }

  __device__ __forceinline__ T* by_head() const { return tiles_; }
  __device__ __forceinline__ T* by_token() const { return tiles_ + kByHeadElements; }

  __device__ __forceinline__ static void store_element(T* target, float value) {
    const float values[8] = {value};
    const Packed<T> packed = pack<T>(values);
    *target = reinterpret_cast<const T*>(&packed)[0];
  }

  // Calls visit(group, i, head) for the heads whose results this thread has to write, where all have them.
  template <class Visit>
  __device__ __forceinline__ void for_own_heads(Visit visit) const {
    if (warp() != 0 || lane() >= 4) return;
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
      const int head = head_of(i / 8) + i % 8;
      if (head < problem_.H) visit(i / 8, i % 8, head);
    }
  }

  // Combines the values of all tokens, for each head; every thread gets the results of its heads.
  template <class Combine>
  __device__ __forceinline__ void reduce_tokens(float (&values)[kGroups][8], Combine combine) const {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
      float& value = values[i / 8][i % 8];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
      if (lane() < 4) scratch_[warp() * kHeads + head_of(i / 8) + i % 8] = value;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
      const float* of_warp = scratch_ + head_of(i / 8) + i % 8;
      float value = of_warp[0];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) value = combine(value, of_warp[other * kHeads]);
      values[i / 8][i % 8] = value;
    }
  }

  // The weights relative to the block's greatest score go to by_head().
  __device__ __forceinline__ void weigh(const Scores& sums, float (&best)[kGroups][8],
                                        float (&total)[kGroups][8]) const {
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) best[i / 8][i % 8] = -INFINITY;
    for_each_product([&](int group, int line, bool present) {
      float values[8];
      sums.get(group, line, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (present) best[group][i] = Max()(best[group][i], problem_.scale * values[i]);
      }
    });
    reduce_tokens(best, Max());
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) total[i / 8][i % 8] = 0;
    for_each_product([&](int group, int line, bool present) {
      float values[8];
      sums.get(group, line, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float weight = present ? expf(problem_.scale * values[i] - best[group][i]) : 0.0f;
        total[group][i] += weight;
        store_element(by_head() + (head_of(group) + i) * kByHeadStride + token_of(line), weight);
      }
    });
    reduce_tokens(total, Add());
  }

  // Calls visit(group, line, whether the line's token takes part).
  template <class Visit>
  __device__ __forceinline__ void for_each_product(Visit visit) const {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      const bool present = takes_part(token_of(line));
#pragma unroll
      for (int group = 0; group < kGroups; ++group) visit(group, line, present);
    }
  }

  // What backward knows of each head before it sees a token, in shared memory; `factor` is 1 / total.
  enum class HeadValue { best, factor, mean, rest };
  static_assert(kWarps >= 4, "the four values have the place of one per warp");

  __device__ __forceinline__ float& of_head(HeadValue value, int head) const {
    return scratch_[static_cast<int>(value) * kHeads + head];
  }

  // Thread h cares for head h. The first barrier after this is that of first_products.
  __device__ __forceinline__ void load_heads(const PoolBackwardTask<T>& task) const {
    const int head = static_cast<int>(threadIdx.x);
    if (head >= problem_.H) return;
    const int64_t row = sample_ * problem_.H + head;
    of_head(HeadValue::best, head) = task.best[row];
    of_head(HeadValue::factor, head) = 1 / task.total[row];
    of_head(HeadValue::rest, head) = 0;
  }

  __device__ __forceinline__ void load_means(const PoolBackwardTask<T>& task) const {
    const int head = static_cast<int>(threadIdx.x);
    if (head >= problem_.H) return;
    const int64_t row = sample_ * problem_.H + head;
    of_head(HeadValue::mean, head) = task.mean[row];
    if (!is_concentrated(task.total[row])) return;
    float rest = 0;
    for (int split = 0; split < problem_.splits; ++split) {
      rest += task.rests[(sample_ * problem_.splits + split) * problem_.H + head];
    }
    of_head(HeadValue::rest, head) = rest;
  }

  // Of one token and eight heads: its weights, and the gradients of its scores but for their scale.
  __device__ __forceinline__ void differentiate(const Scores& scores, const Scores& dweights, int group, int line,
                                                bool present, float (&weight)[8], float (&dscore)[8]) const {
    float score[8], dweight[8];
    scores.get(group, line, score);
    dweights.get(group, line, dweight);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int head = head_of(group) + i;
      weight[i] = dscore[i] = 0;
      if (!present || head >= problem_.H) continue;
      weight[i] = expf(problem_.scale * score[i] - of_head(HeadValue::best, head)) * of_head(HeadValue::factor, head);
      dscore[i] = weight[i] * ((dweight[i] - of_head(HeadValue::mean, head)) - of_head(HeadValue::rest, head));
    }
  }

  // dscores go to by_head() and to by_token(), where the weights follow them.
  __device__ __forceinline__ void score_gradients(const Scores& scores, const Scores& dweights) const {
    for_each_product([&](int group, int line, bool present) {
      float weight[8], dscore[8];
      differentiate(scores, dweights, group, line, present, weight, dscore);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        dscore[i] *= problem_.scale;
        store_element(by_head() + (head_of(group) + i) * kByHeadStride + token_of(line), dscore[i]);
      }
      T* target = by_token() + token_of(line) * kByTokenStride + head_of(group);
      store(target, pack<T>(dscore));
      store(target + kHeads, pack<T>(weight));
    });
  }

  // target [H, D] = by_head() tokens
  __device__ __forceinline__ void sum_tokens(float* target) const {
    T* const tiles = tiles_ + kByHeadElements;
    const auto tile = [&](int i) { return tiles + i % 2 * kTileElements; };
    const int count = (problem_.D + kColumns - 1) / kColumns;
    __syncthreads();
    copy_tokens<kColumns>(tile(0), kTileStride, 0);
    commit_copies();
    for (int i = 0; i < count; ++i) {
      if (i + 1 < count) copy_tokens<kColumns>(tile(i + 1), kTileStride, (i + 1) * kColumns);
      commit_copies();
      wait_for_copies<1>();
      __syncthreads();
      for (int head = 0; head < problem_.H; head += 16) sum_tile(target, tile(i), i * kColumns, head);
      __syncthreads();
    }
    wait_for_copies<0>();
  }

  // Sixteen heads' sums of the warp's 32 columns of a tile.
  __device__ __forceinline__ void sum_tile(float* target, const T* tile, int first_column, int first_head) const {
    Sums<1, 1> sums;
    sums.clear();
    multiply<T, Order::depth>(sums, Tile<const T>{by_head() + first_head * kByHeadStride, kByHeadStride},
                              Tile<const T>{tile, kTileStride}, nullptr, Groups{warp(), 1, 1}, kTokens);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int head = first_head + lane() / 4 + i % 2 * 8;
      const int column = first_column + 32 * warp() + i / 2 * 8 + lane() % 4 * 2;
      if (head >= problem_.H || column >= problem_.D) continue;
      const float (&parts)[4] = sums.parts[0][0][i / 2];
      *reinterpret_cast<float2*>(target + int64_t{head} * problem_.D + column) = {parts[i % 2 * 2],
                                                                                  parts[i % 2 * 2 + 1]};
    }
  }

  // dvisual [N, D] = by_token() [query; dpooled], for the block's tokens
  __device__ __forceinline__ void token_gradients(T* dvisual, const Weights (&operands)[2]) const {
    constexpr int kSteps = 2 * kGroups;
    T* const tiles = tiles_ + kByHeadElements + kByTokenElements;
    HeadStage stage;
    Sums<1, kColumns / 32> sums;
    stage.load(operands[0], 0, 0);
    stage.store(operands[0], tiles, nullptr);
    for (int column = 0; column < problem_.D; column += kColumns) {
      sums.clear();
      // Unrolled, since an operand that is chosen at run time would have to lie in memory.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        constexpr int kLast = kSteps - 1;
        const Weights& next = operands[step == kLast ? 0 : (step + 1) / kGroups];
        const int next_column = step == kLast ? column + kColumns : column;
        if (next_column < problem_.D) stage.load(next, (step + 1) % kGroups * 32, next_column);
        __syncthreads();
        const T* left = by_token() + 16 * warp() * kByTokenStride + step * 32;
        multiply<T, Order::depth>(sums, Tile<const T>{left, kByTokenStride},
                                  Tile<const T>{tiles + step % 2 * HeadStage::kElements, HeadStage::kStride}, nullptr,
                                  Groups{0, 1, kColumns / 32}, 32);
        if (step == kLast) write_gradients(dvisual, sums, column);
        if (next_column < problem_.D) stage.store(next, tiles + (step + 1) % 2 * HeadStage::kElements, nullptr);
      }
    }
  }

  __device__ __forceinline__ void write_gradients(T* dvisual, const Sums<1, kColumns / 32>& sums,
                                                  int first_column) const {
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      const int64_t n = first_ + token_of(i % 2);
      const int column = first_column + head_of(i / 2);
      if (n >= problem_.N || column >= problem_.D) continue;
      float values[8];
      sums.get(i / 2, i % 2, values);
      store(dvisual + n * problem_.D + column, pack<T>(values));
    }
  }

  const PoolProblem<T>& problem_;
  const int64_t sample_;
  const int first_;
  const T* visual_;
  const uint8_t* mask_;
  float* scratch_;
  T* tiles_;
};

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    pool_forward(const __grid_constant__ PoolForwardTask<T> task) {
  const int splits = task.problem.splits;
  PoolBlock<T, kGroups>(task.problem, blockIdx.x / splits, blockIdx.x % splits).forward(task);
}

template <class T>
struct PoolMeansTask {
  PoolProblem<T> pooled;  // as tokens
  PoolBackwardTask<T> backward;
};

// The first block of each sample finds its means; all blocks of samples with a concentrated head find the rests, and
// for that the means once more: so it is one launch.
template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) pool_means(const __grid_constant__ PoolMeansTask<T> task) {
  const int splits = task.backward.problem.splits, split = blockIdx.x % splits;
  const int64_t sample = blockIdx.x / splits;
  PoolBlock<T, kGroups> pooled(task.pooled, sample, 0);
  const bool has_rests = pooled.has_concentrated_head(task.backward.total);
  if (split > 0 && !has_rests) return;
  pooled.find_means();
  if (split == 0) pooled.store_means(task.backward.mean);
  if (has_rests) PoolBlock<T, kGroups>(task.backward.problem, sample, split).find_rests(task.backward);
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    pool_backward(const __grid_constant__ PoolBackwardTask<T> task) {
  const int splits = task.problem.splits;
  PoolBlock<T, kGroups>(task.problem, blockIdx.x / splits, blockIdx.x % splits).backward(task);
}

// The splits' sums of one head to its row: by their shares of the softmax in forward, as they are in backward.
struct PoolFinish {
  const float* sums;          // [B, splits, H, D]
  const float *best, *total;  // [B, splits, H]; null: the sums count as they are
  int splits, H, D;
  Rows out;           // [B * H, D]
  float* statistics;  // [2, B * H], with best
  int64_t rows;       // B * H
};

// To shares [splits], in shared memory. A split of which no token takes part has minus infinity for its greatest score;
// a sample of such splits becomes NaN.
__device__ __forceinline__ void find_shares(const PoolFinish& task, int64_t row, int64_t first, float* shares) {
  float best = -INFINITY, total = 0;
#pragma unroll 1
  for (int i = 0; i < task.splits; ++i) best = Max()(best, task.best[first + int64_t{i} * task.H]);
#pragma unroll 1
  for (int i = 0; i < task.splits; ++i) {
    const int64_t split = first + int64_t{i} * task.H;
    total += expf(task.best[split] - best) * task.total[split];
  }
  for (int i = threadIdx.x; i < task.splits; i += kThreads) {
    shares[i] = expf(task.best[first + int64_t{i} * task.H] - best) / total;
  }
  if (threadIdx.x == 0) {
    task.statistics[row] = best;
    task.statistics[task.rows + row] = total;
  }
}

template <class T>
__device__ __forceinline__ void store_as(T, const Rows& rows, int64_t index, const float (&values)[8]) {
  store(static_cast<T*>(rows.data) + index, pack<T>(values));
}

__global__ void __launch_bounds__(kThreads) pool_finish(const __grid_constant__ PoolFinish task) {
  float* const shares = reinterpret_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x, first = row / task.H * task.splits * task.H + row % task.H;
  if (task.best) find_shares(task, row, first, shares);
  __syncthreads();
  for (int column = threadIdx.x * 8; column < task.D; column += kThreads * 8) {
    float values[8] = {};
#pragma unroll 1
    for (int split = 0; split < task.splits; ++split) {
      const float share = task.best ? shares[split] : 1;
      float part[8];
      unpack(load(task.sums + (first + int64_t{split} * task.H) * task.D + column), part);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = fmaf(share, part[i], values[i]);
    }
    const int64_t index = row * task.D + column;
    if (task.out.dtype == DType::bfloat16) {
      store_as(Bfloat16{}, task.out, index, values);
    } else if (task.out.dtype == DType::float16) {
      store_as(Float16{}, task.out, index, values);
    } else {
      store_as(float{}, task.out, index, values);
    }
  }
}

int launch_finish(Queue queue, const PoolFinish& task) {
  const int shared = static_cast<int>(task.splits * sizeof(float));
  return launch(queue, {dim3(static_cast<unsigned>(task.rows)), kThreads, shared}, &pool_finish, task);
}

template <class T>
PoolProblem<T> problem_of(const AttentionPoolInputs& args) {
  const auto [B, N, D, H] = args.size;
  return {static_cast<const T*>(args.visual.data),
          args.visual_sample,
          args.visual.stride,
          args.mask,
          weights_of(args.query, H, D),
          args.scale,
          static_cast<int>(N),
          static_cast<int>(D),
          static_cast<int>(H),
          static_cast<int>(divide_up(N, kTokens))};
}

struct PoolForwardWorkspace {
  float *sums, *best, *total;
  int64_t bytes;

  PoolForwardWorkspace(const AttentionPoolSizes& size, void* memory) {
    Partition partition(memory);
    const int64_t rows = size.B * divide_up(size.N, kTokens) * size.H;
    sums = partition.take<float>(rows * size.D);
    best = partition.take<float>(rows);
    total = partition.take<float>(rows);
    bytes = partition.bytes();
  }
};

struct PoolBackwardWorkspace {
  float *sums, *mean, *rests;
  int64_t bytes;

  PoolBackwardWorkspace(const AttentionPoolBackward& args, void* memory) {
    Partition partition(memory);
    const auto [B, N, D, H] = args.inputs.size;
    const int64_t splits = divide_up(N, kTokens);
    sums = args.dquery ? partition.take<float>(B * splits * H * D) : nullptr;
    mean = partition.take<float>(B * H);
    rests = partition.take<float>(B * splits * H);
    bytes = partition.bytes();
  }
};

template <class T, int kGroups>
int launch_forward(Queue queue, const PoolForwardTask<T>& task, unsigned blocks) {
  return launch(queue, {dim3(blocks), kThreads, PoolBlock<T, kGroups>::kForwardBytes}, &pool_forward<T, kGroups>, task);
}

template <class T, int kGroups>
int launch_backward(Queue queue, const PoolMeansTask<T>& means, unsigned blocks) {
  using Block = PoolBlock<T, kGroups>;
  const int error = launch(queue, {dim3(blocks), kThreads, Block::kMeansBytes}, &pool_means<T, kGroups>, means);
  if (error) return error;
  return launch(queue, {dim3(blocks), kThreads, Block::kBackwardBytes}, &pool_backward<T, kGroups>, means.backward);
}

template <class T>
int forward(const AttentionPoolForward& args, void* memory, Queue queue) {
  const auto [B, N, D, H] = args.inputs.size;
  if (B == 0) return 0;
  const PoolForwardWorkspace workspace(args.inputs.size, memory);
  const PoolForwardTask<T> task{problem_of<T>(args.inputs), workspace.sums, workspace.best, workspace.total};
  const unsigned blocks = static_cast<unsigned>(B * task.problem.splits);
  const int error = H <= 32 ? launch_forward<T, 1>(queue, task, blocks) : launch_forward<T, 2>(queue, task, blocks);
  if (error) return error;
  return launch_finish(
      queue, PoolFinish{workspace.sums, workspace.best, workspace.total, task.problem.splits, static_cast<int>(H),
                        static_cast<int>(D), args.pooled, args.statistics, B * H});
}

template <class T>
int backward(const AttentionPoolBackward& args, void* memory, Queue queue) {
  const auto [B, N, D, H] = args.inputs.size;
  if (B == 0) return 0;
  const PoolBackwardWorkspace workspace(args, memory);
  const int64_t rows = B * H;
  const Weights dpooled = weights_of(args.dpooled, H, D);
  const PoolBackwardTask<T> task{problem_of<T>(args.inputs),
                                 dpooled,
                                 args.statistics,
                                 args.statistics + rows,
                                 workspace.mean,
                                 workspace.rests,
                                 static_cast<T*>(args.dvisual.data),
                                 workspace.sums};
  PoolMeansTask<T> means{task.problem, task};
  means.pooled.visual = static_cast<const T*>(args.pooled.data);
  means.pooled.visual_sample = H * args.pooled.stride;
  means.pooled.visual_stride = args.pooled.stride;
  means.pooled.mask = nullptr;
  means.pooled.query = dpooled;
  means.pooled.N = static_cast<int>(H);
  means.pooled.splits = 1;
  const unsigned blocks = static_cast<unsigned>(B * task.problem.splits);
  const int error = H <= 32 ? launch_backward<T, 1>(queue, means, blocks) : launch_backward<T, 2>(queue, means, blocks);
  if (error || !args.dquery) return error;
  return launch_finish(queue, PoolFinish{workspace.sums,
                                         nullptr,
                                         nullptr,
                                         task.problem.splits,
                                         static_cast<int>(H),
                                         static_cast<int>(D),
                                         {args.dquery, DType::float32},
                                         nullptr,
                                         rows});
}

}  // namespace

int64_t attention_pool_forward_workspace(const AttentionPoolForward& args) {
  return PoolForwardWorkspace(args.inputs.size, nullptr).bytes;
}

int attention_pool_forward(const AttentionPoolForward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return forward<decltype(element)>(args, workspace, queue); });
}

int64_t attention_pool_backward_workspace(const AttentionPoolBackward& args) {
  return PoolBackwardWorkspace(args, nullptr).bytes;
}

int attention_pool_backward(const AttentionPoolBackward& args, void* workspace, Queue queue) {
  return with_element(args.inputs.visual.dtype,
                      [&](auto element) { return backward<decltype(element)>(args, workspace, queue); });
}

}  // namespace petl::cuda
