// A long product's chunks on their way to the multiprocessor.
#pragma once
#include "kernels/cuda/ptx.h"

namespace petl::cuda {

// Brings `count` chunks through a ring of kStages places in shared memory: while use(place) multiplies one, the next
// kStages - 1 are being copied. copy(place) begins the copies of the chunk after the one it began last; all threads
// call all three. In arrive(place) a thread sees what it has copied itself, and may change it; in use() all may read
// what any of them copied and changed. use() begins with the lanes of a warp together.
template <int kStages, class Copy, class Arrive, class Use>
__device__ __forceinline__ void stream_chunks(int count, Copy copy, Arrive arrive, Use use) {
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
    arrive(place);
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

template <int kStages, class Copy, class Use>
__device__ __forceinline__ void stream_chunks(int count, Copy copy, Use use) {
  stream_chunks<kStages>(count, copy, [](int) {}, use);
}

}  // namespace petl::cuda
