// The Hopper path's skeleton: two products with something in between, for rows of x,
//
//     hidden = op(x first^T),    out = op(y, hidden second),
//
// as sandwich.h has it for all GPUs.
//
// A block has two consumers, warpgroups with 64 rows each, and a producer: one thread of a third warpgroup, since that
// is the unit in which registers change hands. All that the producer copies goes through one ring. A stage holds, in
// the first product, a chunk of x [128, 64] and the first weights' chunk [inner, 64]; in the second, a chunk of y and
// the second weights' chunk [64, inner]: the same bytes, so that the ring does not notice where one product ends and
// the next begins, and y is on its way while the first product is computed. The second product's left operand never
// leaves its registers. A chunk of out takes the place of the chunk of y in its stage, and leaves from there.
//
// The blocks of a cluster need the same weights at the same time: each copies its share of a tile to all of them.
//
// An op has the types Element, Statistics (what is found of the rows of x on their way, if kReadsRows) and Terms (what
// activate leaves for combine), and
//
//     activate(sums, first_row, R, statistics, terms, hidden)    the first product's sums of a lane, of two rows
//     combine(y, sum, line, column, terms)                       two neighboring elements of out
#pragma once
#include "kernels/cuda/hopper_layout.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

template <class Op>
struct HopperTask {
  TileMap x, y, out;    // [R, D]; tiles of 64, 64 and 16 rows
  const void* weights;  // packed
  int64_t R;
  int D;
  int passes;   // over x: 2 if the first weights have a rest
  bool adds_y;  // there is a y
  Op op;
};

constexpr int kRowBytes = 2 * kHopperChunk;
constexpr int kGroupRows = 64, kHopperGroups = 2, kHopperRows = kGroupRows * kHopperGroups, kWarpRows = 16;
constexpr int kConsumerWarps = 4 * kHopperGroups, kHopperThreads = 32 * (kConsumerWarps + 4);

// Of a thread. A block has its multiprocessor to itself and starts with as many for every thread as that has; what the
// consumers take then, the producer must have given up, or they would wait for ever.
constexpr int kStartRegisters = 65536 / kHopperThreads / 8 * 8, kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + kHopperGroups * kConsumerRegisters <= (kHopperGroups + 1) * kStartRegisters);

__device__ __forceinline__ float2 unpack_pair(uint32_t packed, Bfloat16) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack_pair(uint32_t packed, Float16) { return unpack_float16(packed); }

template <int kInner>
struct HopperStage {
  static constexpr int kRowsBytes = kHopperRows * kRowBytes, kWeightsBytes = kInner * kRowBytes;
  static constexpr int kBytes = kRowsBytes + kWeightsBytes;
  static constexpr int kFit = ((227 << 10) - 256) / kBytes, kCount = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = kCount * kBytes + 2 * kCount * static_cast<int>(sizeof(Barrier));
};

// A place in the ring. Whoever fills a stage waits for the parity before, which is that of a phase that never was while
// the ring is filled for the first time.
template <int kStages>
struct Position {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <class Op, int kInner, int kCluster>
class HopperSandwich {
  using Its = HopperStage<kInner>;
  using T = typename Op::Element;
  static constexpr int kStages = Its::kCount, kSteps = kInner / 16;

 public:
  __device__ __forceinline__ explicit HopperSandwich(const HopperTask<Op>& task) : task_(task), memory_(tile_memory()) {
    full_ = reinterpret_cast<Barrier*>(memory_ + kStages * Its::kBytes);
    empty_ = full_ + kStages;
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        make_barrier(&full_[stage], 1);
        make_barrier(&empty_[stage], kConsumerWarps * kCluster);
      }
      show_barriers();
    }
    synchronize_blocks();
    if (warp() >= kConsumerWarps) {
      give_up_registers<kProducerRegisters>();
      if (threadIdx.x == 32 * kConsumerWarps) produce();
      __syncwarp();
    } else {
      take_registers<kConsumerRegisters>();
      consume();
    }
    // Another block's copies and arrivals need this one's shared memory until then.
    if (kCluster > 1) synchronize_cluster();
  }

 private:
  __device__ __forceinline__ void synchronize_blocks() const {
    if (kCluster > 1) {
      synchronize_cluster();
    } else {
      __syncthreads();
    }
  }

  // Blocks of rows are dealt out in turn. Those of a cluster take as many turns, even with nothing left for some: what
  // is outside of the matrix is read as zeros and not written.
  template <class Visit>
  __device__ __forceinline__ void for_each_tile(Visit visit) const {
    const int64_t tiles = (task_.R + kHopperRows - 1) / kHopperRows;
    const int rank = kCluster > 1 ? static_cast<int>(blockIdx.x) % kCluster : 0;
    for (int64_t tile = blockIdx.x - rank; tile < tiles; tile += gridDim.x) {
      visit(static_cast<int>((tile + rank) * kHopperRows));
    }
  }

  __device__ __forceinline__ void produce() const {
    prefetch_map(task_.x);
    if (task_.adds_y) prefetch_map(task_.y);
    Position<kStages> at;
    for_each_tile([&](int first_row) {
      const unsigned char* weights = static_cast<const unsigned char*>(task_.weights);
#pragma unroll 1
      for (int product = 0; product <= task_.passes; ++product) {
        const TileMap& map = product < task_.passes ? task_.x : task_.y;
        const bool copies_rows = product < task_.passes || task_.adds_y;
#pragma unroll 1
        for (int column = 0; column < task_.D; column += kHopperChunk, weights += Its::kWeightsBytes, at.advance()) {
          wait(&empty_[at.stage], at.parity ^ 1);
          arrive_and_expect(&full_[at.stage], copies_rows ? Its::kBytes : Its::kWeightsBytes);
          for (int group = 0; copies_rows && group < kHopperGroups; ++group) {
            copy_tile(rows(at.stage, group), map, column, first_row + group * kGroupRows, &full_[at.stage]);
          }
          copy_weights(at.stage, weights);
        }
      }
    });
  }

  __device__ __forceinline__ void copy_weights(int stage, const unsigned char* tile) const {
    if constexpr (kCluster == 1) {
      copy_bulk(weights(stage), tile, Its::kWeightsBytes, &full_[stage]);
    } else {
      constexpr int kShare = Its::kWeightsBytes / kCluster;
      const int offset = rank_in_cluster() * kShare;
      copy_bulk_to((1 << kCluster) - 1, weights(stage) + offset, tile + offset, kShare, &full_[stage]);
    }
  }

  // The warp needs the stage no more. Its lanes must meet again before the next product.
  __device__ __forceinline__ void release(int stage) const {
    if constexpr (Op::kReadsRows) __syncwarp();
    if (threadIdx.x % 32 == 0) {
      if constexpr (kCluster == 1) {
        arrive(&empty_[stage]);
      } else {
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) arrive_at(&empty_[stage], rank);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void consume() const {
    Position<kStages> at;
    for_each_tile([&](int first_row) {
      // Cleared, though the first product could begin with it: so the compiler sees that no sum outlives its tile, and
      // may use the registers again.
      float sums[kInner / 2] = {};
      typename Op::Statistics statistics;
      sum_first(sums, statistics, at);
      typename Op::Terms terms;
      uint32_t hidden[kSteps][4];
      const int lane = threadIdx.x % 32;
      task_.op.activate(sums, first_row + warp() * kWarpRows + lane / 4, task_.R, statistics, terms, hidden);
      write_rows(hidden, first_row, terms, at);
    });
  }

  // sums += x first^T. The products of one stage are under way while the next one is waited for.
  __device__ __forceinline__ void sum_first(float (&sums)[kInner / 2], typename Op::Statistics& statistics,
                                            Position<kStages>& at) const {
    const int chunks = task_.D / kHopperChunk * task_.passes;
    int last = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait(&full_[at.stage], at.parity);
      const uint64_t left = describe_tile(rows(at.stage, group()), kRowBytes);
      const uint64_t right = describe_tile(weights(at.stage), kRowBytes);
      fence_products(sums);
#pragma unroll
      for (int step = 0; step < kHopperChunk / 16; ++step) {
        multiply_tiles<T>(sums, left + step * 32 / 16, right + step * 32 / 16);
      }
      commit_products();
      if constexpr (Op::kReadsRows) read_rows(statistics, at.stage, chunk);
      wait_for_products<1>(sums);
      if (chunk > 0) release(last);
      last = at.stage;
      at.advance();
    }
    wait_for_products<0>(sums);
    release(last);
  }

  // The warp's rows of a chunk of x, while the products are under way: in one lane rows g and g + 8, as it has the
  // sums.
  __device__ __forceinline__ void read_rows(typename Op::Statistics& statistics, int stage, int chunk) const {
    float values[2][kHopperChunk / 4];
#pragma unroll
    for (int block = 0; block < kHopperChunk / 16; ++block) {
      uint32_t pairs[4];
      load_matrices(pairs, of_lane(rows_of_warp(stage), block));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair(pairs[i], T{});
        values[i % 2][block * 4 + i / 2 * 2] = pair.x;
        values[i % 2][block * 4 + i / 2 * 2 + 1] = pair.y;
      }
    }
    statistics.add(values, chunk);
  }

  __device__ __forceinline__ void write_rows(const uint32_t (&hidden)[kSteps][4], int first_row,
                                             const typename Op::Terms& terms, Position<kStages>& at) const {
    const int lane = threadIdx.x % 32, row = first_row + warp() * kWarpRows;
    int last = -1;
#pragma unroll 1
    for (int column = 0; column < task_.D; column += kHopperChunk) {
      wait(&full_[at.stage], at.parity);
      float sums[kHopperChunk / 2];
      fence_products(sums);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const Piece piece = piece_with(kInner, step * 16);
        const uint64_t right = describe_tile(weights(at.stage) + piece.first * kRowBytes, piece.width * 2);
        multiply_registers<T>(sums, hidden[step], right + (step * 16 - piece.first) * 2 / 16, step);
      }
      commit_products();
      wait_for_products<0>(sums);
      unsigned char* const tile = rows_of_warp(at.stage);
      add_rows(sums, tile, column, terms);
      show_writes();
      __syncwarp();
      if (lane == 0) {
        store_tile(task_.out, column, row, tile);
        commit_stores();
        wait_for_reads<1>();
      }
      // The store before this one has read its stage.
      if (last >= 0) release(last);
      last = at.stage;
      at.advance();
    }
    if (lane == 0) wait_for_reads<0>();
    release(last);
  }

  // The warp's rows of a chunk of y become those of out.
  __device__ __forceinline__ void add_rows(const float (&sums)[kHopperChunk / 2], unsigned char* tile, int first_column,
                                           const typename Op::Terms& terms) const {
#pragma unroll
    for (int block = 0; block < kHopperChunk / 16; ++block) {
      unsigned char* const at = of_lane(tile, block);
      uint32_t pairs[4] = {};
      if (task_.adds_y) load_matrices(pairs, at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 y = unpack_pair(pairs[i], T{});
        const float2 sum = make_float2(sums[block * 8 + i * 2], sums[block * 8 + i * 2 + 1]);
        const int column = first_column + block * 16 + i / 2 * 8 + threadIdx.x % 4 * 2;
        const float2 out = task_.op.combine(y, sum, i % 2, column, terms);
        pairs[i] = pack_pair(out.x, out.y, T{});
      }
      store_matrices(at, pairs);
    }
  }

  // What the lane names of 16 rows and the block's 16 columns: row l % 16 of the 8 columns l / 16. What it has of them
  // is what it has of the sums.
  __device__ __forceinline__ unsigned char* of_lane(unsigned char* tile, int block) const {
    const int lane = threadIdx.x % 32;
    return tile + swizzled(lane % 16 * kRowBytes + block * 32 + lane / 16 * 16, kRowBytes);
  }
  __device__ __forceinline__ unsigned char* rows_of_warp(int stage) const {
    return rows(stage, group()) + warp() % 4 * kWarpRows * kRowBytes;
  }
  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ int group() const { return warp() / 4; }
  __device__ __forceinline__ unsigned char* rows(int stage, int group) const {
    return memory_ + stage * Its::kBytes + group * kGroupRows * kRowBytes;
  }
  __device__ __forceinline__ unsigned char* weights(int stage) const {
    return memory_ + stage * Its::kBytes + Its::kRowsBytes;
  }

  const HopperTask<Op>& task_;
  unsigned char* memory_;
  Barrier *full_, *empty_;
};

template <class Op, int kInner, int kCluster>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_sandwich(const __grid_constant__ HopperTask<Op> task) {
  HopperSandwich<Op, kInner, kCluster>(task).run();
}

}  // namespace petl::cuda
