// A long product's chunks on their way to the multiprocessor.
#pragma once
#include "kernels/cuda/ptx.h"

namespace petl::cuda {

// Brings `count` chunks through a ring of kStages places in shared memory: while use(place) multiplies one, the next
// kStages - 1 are being copied. copy(place) begins the copies of the chunk after the one it began last; all threads
// call both, and what one of them copies all may read in use().
template <int kStages, class Copy, class Use>
__device__ __forceinline__ void stream_chunks(int count, Copy copy, Use use) {
  static_assert(kStages >= 2, "a chunk is copied while another one is in use");
#pragma unroll
  for (int place = 0; place < kStages - 1; ++place) {
    if (place < count) copy(place);
    commit_copies();
  }
  int place = 0, free = kStages - 1;
#pragma unroll 1
  for (int chunk = 0; chunk < count; ++chunk) {
    wait_for_copies<kStages - 2>();
    // The chunk is there for all threads, and all have done with the one before it.
    __syncthreads();
    if (chunk + kStages - 1 < count) copy(free);
    commit_copies();
    use(place);
    place = place + 1 == kStages ? 0 : place + 1;
    free = free + 1 == kStages ? 0 : free + 1;
  }
  wait_for_copies<0>();
}

// The same in rounds of kStages chunks, for uses so short that their addresses would cost as much as their products: a
// place is a constant of the code, which is kStages times as long, and so is what a chunk adds to pointers that move
// once a round. Chunk `first` + `ahead` is copied to place `ahead` % kStages by copy(first, ahead), which is called for
// chunks beyond the last too and then does nothing; use(first, place) follows. After a round comes next_round().
template <int kStages, class Copy, class Use, class NextRound>
__device__ __forceinline__ void stream_rounds(int count, Copy copy, Use use, NextRound next_round) {
  static_assert(kStages >= 2, "a chunk is copied while another one is in use");
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    copy(0, ahead);
    commit_copies();
  }
#pragma unroll 1
  for (int first = 0; first < count; first += kStages) {
#pragma unroll
    for (int place = 0; place < kStages; ++place) {
      if (first + place >= count) break;
      wait_for_copies<kStages - 2>();
      __syncthreads();
      copy(first, place + kStages - 1);
      commit_copies();
      use(first, place);
    }
    next_round();
  }
  wait_for_copies<0>();
}

}  // namespace petl::cuda
