// The ring of the Hopper path: what one thread copies, and what warpgroups multiply.
//
// A stage holds a tile of rows [128, 64] of one matrix, or of two side by side, and a tile of weights [inner, 64]. Its
// barrier `full` counts the bytes that have come, `empty` the consumer warps that need it no more. The blocks of a
// cluster need the same weights at the same time: each copies its share of a tile to all of them.
#pragma once
#include "kernels/cuda/hopper_layout.h"

namespace petl::cuda {

constexpr int kRowBytes = 2 * kHopperChunk;
constexpr int kGroupRows = 64, kHopperGroups = 2, kHopperRows = kGroupRows * kHopperGroups, kWarpRows = 16;
constexpr int kConsumerWarps = 4 * kHopperGroups, kHopperThreads = 32 * (kConsumerWarps + 4);

template <int kInner, int kTiles>
struct HopperStage {
  static constexpr int kTileBytes = kHopperRows * kRowBytes, kRowsBytes = kTiles * kTileBytes;
  static constexpr int kWeightsBytes = kInner * kRowBytes, kBytes = kRowsBytes + kWeightsBytes;
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

template <int kInner, int kTiles, int kCluster>
class HopperRing {
 public:
  using Its = HopperStage<kInner, kTiles>;
  using At = Position<Its::kCount>;

  __device__ __forceinline__ HopperRing() : memory_(tile_memory()) {
    full_ = reinterpret_cast<Barrier*>(memory_ + Its::kCount * Its::kBytes);
    empty_ = full_ + Its::kCount;
  }

  // By all threads of the block.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Its::kCount; ++stage) {
        make_barrier(&full_[stage], 1);
        make_barrier(&empty_[stage], kConsumerWarps * kCluster);
      }
      show_barriers();
    }
    if (kCluster > 1) {
      synchronize_cluster();
    } else {
      __syncthreads();
    }
  }

  // Another block's copies and arrivals need this one's shared memory until then.
  __device__ __forceinline__ void end() const {
    if (kCluster > 1) synchronize_cluster();
  }

  // For the producer: once nobody needs the stage, announces so many tiles of rows, and one of weights. Then it begins
  // to copy them.
  __device__ __forceinline__ void open(const At& at, int tiles) const {
    wait(&empty_[at.stage], at.parity ^ 1);
    arrive_and_expect(&full_[at.stage], tiles * Its::kTileBytes + Its::kWeightsBytes);
  }

  __device__ __forceinline__ void copy_rows(const At& at, int tile, const TileMap& map, int column, int row) const {
    for (int group = 0; group < kHopperGroups; ++group) {
      copy_tile(rows(at.stage, tile, group), map, column, row + group * kGroupRows, &full_[at.stage]);
    }
  }

  __device__ __forceinline__ void copy_weights(const At& at, const unsigned char* tile) const {
    Barrier* const full = &full_[at.stage];
    if constexpr (kCluster == 1) {
      copy_bulk(weights(at.stage), tile, Its::kWeightsBytes, full);
    } else {
      constexpr int kShare = Its::kWeightsBytes / kCluster;
      const int offset = rank_in_cluster() * kShare;
      copy_bulk_to((1 << kCluster) - 1, weights(at.stage) + offset, tile + offset, kShare, full);
    }
  }

  // For consumers: until what was copied has come.
  __device__ __forceinline__ void wait_for(const At& at) const { wait(&full_[at.stage], at.parity); }

  // The warp needs the stage no more. Its lanes must meet again before the next product; where they read the stage on
  // their own (kReads), they must have done so.
  template <bool kReads>
  __device__ __forceinline__ void release(int stage) const {
    if constexpr (kReads) __syncwarp();
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

  // A group's rows of a tile, and those of this warp.
  __device__ __forceinline__ unsigned char* rows(int stage, int tile, int group) const {
    return memory_ + stage * Its::kBytes + tile * Its::kTileBytes + group * kGroupRows * kRowBytes;
  }
  __device__ __forceinline__ unsigned char* rows_of_warp(int stage, int tile) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return rows(stage, tile, warp / 4) + warp % 4 * kWarpRows * kRowBytes;
  }
  __device__ __forceinline__ unsigned char* weights(int stage) const {
    return memory_ + stage * Its::kBytes + Its::kRowsBytes;
  }

 private:
  unsigned char* memory_;
  Barrier *full_, *empty_;
};

}  // namespace petl::cuda
