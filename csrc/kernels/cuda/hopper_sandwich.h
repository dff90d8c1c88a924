// The Hopper path's skeleton: products with something in between, for rows of x,
//
//     hidden = op(x first^T),    out = op(y, hidden second),
//
// as sandwich.h has it for all GPUs. There may be two first products, of two matrices of rows, one after the other.
//
// A block has two consumers, warpgroups with 64 rows each, and a producer: one thread of a third warpgroup, since that
// is the unit in which registers change hands. All that the producer copies goes through one ring (hopper_ring.h). A
// stage holds, in the first product, a chunk of x [128, 64] and the first weights' chunk [inner, 64]; in the second, a
// chunk of y and the second weights' chunk [64, inner]: the same bytes, so that the ring does not notice where one
// product ends and the next begins, and y is on its way while the first product is computed. The second product's left
// operand never leaves its registers. A chunk of out takes the place of the chunk of y in its stage, and leaves from
// there.
//
// An op has the types Element, Terms (what it hands on to combine) and Watch (what it finds of rows on their way, from
// their tiles in shared memory), and
//
//     kLefts, kTiles                          how many matrices of rows the first products take, and how many
//                                             are added (or 1: the place of out)
//     prefetch(first_row, R)                  by the producer, before a tile of rows
//     FirstWatch, keep(sums, rows, watch, terms)    if kLefts is 2: what the first of them leaves
//     activate(sums, rows, watch, terms, hidden)    the last first product's sums of a lane, of two rows
//     combine(added, sum, line, column, terms)      two neighboring elements of out
#pragma once
#include "kernels/cuda/hopper_rows.h"

namespace petl::cuda {

template <class Op>
struct HopperTask {
  TileMap left[Op::kLefts], added[Op::kTiles], out;  // [R, D]; tiles of 64, 64 and 16 rows
  const void* weights;                               // packed
  int64_t R;
  int D;
  int passes;             // over the left matrices: one more than they are if the first weights have a rest
  bool adds[Op::kTiles];  // whether there is something to add
  bool writes;            // whether there is a second product
  Op op;
};

// Of a thread. A block has its multiprocessor to itself and starts with as many for every thread as that has; what the
// consumers take then, the producer must have given up, or they would wait for ever.
constexpr int kStartRegisters = 65536 / kHopperThreads / 8 * 8, kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + kHopperGroups * kConsumerRegisters <= (kHopperGroups + 1) * kStartRegisters);

template <class Op, int kInner, int kCluster>
class HopperSandwich {
  using Ring = HopperRing<kInner, Op::kTiles, kCluster>;
  using At = typename Ring::At;
  using T = typename Op::Element;
  static constexpr int kSteps = kInner / 16;

 public:
  __device__ __forceinline__ explicit HopperSandwich(const HopperTask<Op>& task) : task_(task) {}

  __device__ __forceinline__ void run() const {
    ring_.begin();
    if (warp() >= kConsumerWarps) {
      give_up_registers<kProducerRegisters>();
      if (threadIdx.x == 32 * kConsumerWarps) produce();
      __syncwarp();
    } else {
      take_registers<kConsumerRegisters>();
      consume();
    }
    ring_.end();
  }

 private:
  // Blocks of rows are dealt out in turn. Those of a cluster take as many turns, even with nothing left for some: what
  // is outside of the matrix is read as zeros and not written.
  template <class Visit>
  __device__ __forceinline__ void for_each_tile(Visit visit) const {
    const int tiles = static_cast<int>((task_.R + kHopperRows - 1) / kHopperRows), block = static_cast<int>(blockIdx.x);
    const int rank = kCluster > 1 ? block % kCluster : 0;
    for (int tile = block - rank; tile < tiles; tile += static_cast<int>(gridDim.x)) visit((tile + rank) * kHopperRows);
  }

  __device__ __forceinline__ void produce() const {
    for (const TileMap& map : task_.left) prefetch_map(map);
    int added = 0;
    for (int tile = 0; tile < Op::kTiles; ++tile) {
      added += task_.adds[tile];
      if (task_.adds[tile]) prefetch_map(task_.added[tile]);
    }
    At at;
    for_each_tile([&](int first_row) {
      task_.op.prefetch(first_row, task_.R);
      const unsigned char* weights = static_cast<const unsigned char*>(task_.weights);
#pragma unroll 1
      for (int product = 0; product < task_.passes + (task_.writes ? 1 : 0); ++product) {
        const bool is_first = product < task_.passes;
        const TileMap& left = task_.left[product < Op::kLefts ? product : Op::kLefts - 1];
#pragma unroll 1
        for (int column = 0; column < task_.D; column += kHopperChunk) {
          ring_.open(at, is_first ? 1 : added);
          if (is_first) ring_.copy_rows(at, 0, left, column, first_row);
#pragma unroll
          for (int tile = 0; tile < Op::kTiles; ++tile) {
            if (!is_first && task_.adds[tile]) ring_.copy_rows(at, tile, task_.added[tile], column, first_row);
          }
          ring_.copy_weights(at, weights);
          weights += Ring::Its::kWeightsBytes;
          at.advance();
        }
      }
    });
  }

  __device__ __forceinline__ void consume() const {
    const int chunks = task_.D / kHopperChunk;
    At at;
    for_each_tile([&](int first_row) {
      const WarpRows rows{first_row + warp() * kWarpRows, task_.R};
      typename Op::Terms terms;
      if constexpr (Op::kLefts == 2) {
        float sums[kInner / 2] = {};
        typename Op::FirstWatch watch(task_.op, rows);
        sum_first(sums, watch, chunks, at);
        task_.op.keep(sums, rows, watch, terms);
      }
      // Cleared, though the first product could begin with it: so the compiler sees that no sum outlives its tile, and
      // may use the registers again.
      float sums[kInner / 2] = {};
      typename Op::Watch watch(task_.op, rows);
      sum_first(sums, watch, chunks * (task_.passes - Op::kLefts + 1), at);
      uint32_t hidden[kSteps][4];
      task_.op.activate(sums, rows, watch, terms, hidden);
      if (task_.writes) write_rows(hidden, static_cast<int>(rows.first), terms, at);
    });
  }

  // sums += x first^T. The products of one stage are under way while the next one is waited for.
  template <class Watch>
  __device__ __forceinline__ void sum_first(float (&sums)[kInner / 2], Watch& watch, int chunks, At& at) const {
    int last = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ring_.wait_for(at);
      const uint64_t left = describe_tile(ring_.rows(at.stage, 0, warp() / 4), kRowBytes);
      const uint64_t right = describe_tile(ring_.weights(at.stage), kRowBytes);
      fence_products(sums);
#pragma unroll
      for (int step = 0; step < kHopperChunk / 16; ++step) {
        multiply_tiles<T>(sums, left + step * 32 / 16, right + step * 32 / 16);
      }
      commit_products();
      if constexpr (Watch::kReads) watch.look(ring_.rows_of_warp(at.stage, 0), chunk);
      wait_for_products<1>(sums);
      if (chunk > 0) ring_.template release<Watch::kReads>(last);
      last = at.stage;
      at.advance();
    }
    wait_for_products<0>(sums);
    ring_.template release<Watch::kReads>(last);
  }

  __device__ __forceinline__ void write_rows(const uint32_t (&hidden)[kSteps][4], int row,
                                             const typename Op::Terms& terms, At& at) const {
    const int lane = threadIdx.x % 32;
    int last = -1;
#pragma unroll 1
    for (int column = 0; column < task_.D; column += kHopperChunk) {
      ring_.wait_for(at);
      float sums[kHopperChunk / 2];
      fence_products(sums);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const Piece piece = piece_with(kInner, step * 16);
        const uint64_t right = describe_tile(ring_.weights(at.stage) + piece.first * kRowBytes, piece.width * 2);
        multiply_registers<T>(sums, hidden[step], right + (step * 16 - piece.first) * 2 / 16, step);
      }
      commit_products();
      wait_for_products<0>(sums);
      add_rows(sums, at.stage, column, terms);
      show_writes();
      __syncwarp();
      if (lane == 0) {
        store_tile(task_.out, column, row, ring_.rows_of_warp(at.stage, 0));
        commit_stores();
        wait_for_reads<1>();
      }
      // The store before this one has read its stage.
      if (last >= 0) ring_.template release<false>(last);
      last = at.stage;
      at.advance();
    }
    if (lane == 0) wait_for_reads<0>();
    ring_.template release<false>(last);
  }

  // The warp's rows of a chunk of out, in the place of the first that is added.
  __device__ __forceinline__ void add_rows(const float (&sums)[kHopperChunk / 2], int stage, int first_column,
                                           const typename Op::Terms& terms) const {
#pragma unroll
    for (int block = 0; block < kHopperChunk / 16; ++block) {
      uint32_t pairs[Op::kTiles][4] = {};
#pragma unroll
      for (int tile = 0; tile < Op::kTiles; ++tile) {
        if (task_.adds[tile]) load_matrices(pairs[tile], of_lane(ring_.rows_of_warp(stage, tile), block));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 added[Op::kTiles];
#pragma unroll
        for (int tile = 0; tile < Op::kTiles; ++tile) added[tile] = unpack_pair(pairs[tile][i], T{});
        const float2 sum = make_float2(sums[block * 8 + i * 2], sums[block * 8 + i * 2 + 1]);
        const int column = first_column + block * 16 + i / 2 * 8 + threadIdx.x % 4 * 2;
        const float2 out = task_.op.combine(added, sum, i % 2, column, terms);
        pairs[0][i] = pack_pair(out.x, out.y, T{});
      }
      store_matrices(of_lane(ring_.rows_of_warp(stage, 0), block), pairs[0]);
    }
  }

  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }

  const HopperTask<Op>& task_;
  const Ring ring_;
};

template <class Op, int kInner, int kCluster>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_sandwich(const __grid_constant__ HopperTask<Op> task) {
  HopperSandwich<Op, kInner, kCluster>(task).run();
}

}  // namespace petl::cuda
