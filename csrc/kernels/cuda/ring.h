// A long product's chunks on their way to the multiprocessor, through a ring of places in shared memory: while one is
// multiplied, the next are being copied.
#pragma once
#include "kernels/cuda/ptx.h"

namespace petl::cuda {

// Begins to copy the first kStages - 1 of `count` chunks. copy(place) begins the copies of the chunk after the one it
// began last; all threads of the block call it.
template <int kStages, class Copy>
__device__ __forceinline__ void begin_chunks(int count, Copy& copy) {
  static_assert(kStages >= 2, "a chunk is copied while another one is in use");
#pragma unroll
  for (int place = 0; place < kStages - 1; ++place) {
    if (place < count) copy(place);
    commit_copies();
  }
}

// Once they have begun: calls for each chunk arrived(place), when what this thread has copied of it is there, and may
// be changed, and then use(place), when all of it is there for all threads. use() begins with the lanes of a warp
// together.
template <int kStages, class Copy, class Arrived, class Use>
__device__ __forceinline__ void run_chunks(int count, Copy& copy, Arrived arrived, Use use) {
  int place = 0, free = kStages - 1;
#pragma unroll 1
  for (int chunk = 0; chunk < count; ++chunk) {
    wait_for_copies<kStages - 2>();
    arrived(place);
    // The chunk is there for all threads, and all have done with the one before it.
    __syncthreads();
    if (chunk + kStages - 1 < count) copy(free);
    commit_copies();
    __syncwarp();
    use(place);
    free = place;
    place = place + 1 == kStages ? 0 : place + 1;
  }
  wait_for_copies<0>();
}

template <int kStages, class Copy, class Arrived, class Use>
__device__ __forceinline__ void stream_chunks(int count, Copy copy, Arrived arrived, Use use) {
  begin_chunks<kStages>(count, copy);
  run_chunks<kStages>(count, copy, arrived, use);
}

template <int kStages, class Copy, class Use>
__device__ __forceinline__ void stream_chunks(int count, Copy copy, Use use) {
  stream_chunks<kStages>(count, copy, [](int) {}, use);
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
      __syncwarp();
      use(first, place);
    }
    next_round();
  }
  wait_for_copies<0>();
}

}  // namespace petl::cuda
