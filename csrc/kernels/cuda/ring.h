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

}  // namespace petl::cuda
