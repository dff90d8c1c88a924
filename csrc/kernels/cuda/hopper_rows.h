// The 16 rows of a warp, as an op of the Hopper path meets them: their numbers, and their part of a tile of rows.
#pragma once
#include "kernels/cuda/hopper_ring.h"
#include "kernels/cuda/reduce.h"

namespace petl::cuda {

__device__ __forceinline__ float2 unpack_pair(uint32_t packed, Bfloat16) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack_pair(uint32_t packed, Float16) { return unpack_float16(packed); }

struct WarpRows {
  int64_t first, R;

  // Of the lane's two lines of sums.
  __device__ __forceinline__ int64_t line(int i) const {
    return first + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i;
  }
  __device__ __forceinline__ bool has_line(int i) const { return line(i) < R; }
};

// What a lane names of 16 rows and the block's 16 columns: row l % 16 of the 8 columns l / 16. What it has of them by
// load_matrices is what it has of the sums.
__device__ __forceinline__ unsigned char* of_lane(unsigned char* tile, int block) {
  const int lane = threadIdx.x % 32;
  return tile + swizzled(lane % 16 * kRowBytes + block * 32 + lane / 16 * 16, kRowBytes);
}

// A chunk of the warp's rows as the lane has its sums: of rows g and g + 8 two neighboring columns in every 8.
template <class T>
__device__ __forceinline__ void load_as_sums(unsigned char* tile, float (&values)[2][kHopperChunk / 4]) {
#pragma unroll
  for (int block = 0; block < kHopperChunk / 16; ++block) {
    uint32_t pairs[4];
    load_matrices(pairs, of_lane(tile, block));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair(pairs[i], T{});
      values[i % 2][block * 4 + i / 2 * 2] = pair.x;
      values[i % 2][block * 4 + i / 2 * 2 + 1] = pair.y;
    }
  }
}

// The same chunk as it lies in device memory: of every fourth row, from row l / 8 on, eight neighboring columns. So
// what else there is of these rows is read and written by whole lines of 128 bytes.
struct RowVectors {
  static constexpr int kCount = kWarpRows / 4;

  __device__ __forceinline__ static int row(int i) { return static_cast<int>(threadIdx.x) % 32 / 8 + 4 * i; }
  __device__ __forceinline__ static int column() { return static_cast<int>(threadIdx.x) % 8 * 8; }
  template <class T>
  __device__ __forceinline__ static Packed<T> load(const unsigned char* tile, int i) {
    return cuda::load(reinterpret_cast<const T*>(tile + swizzled(row(i) * kRowBytes + column() * 2, kRowBytes)));
  }
};

// What looks at no rows on their way.
struct NoHopperWatch {
  static constexpr bool kReads = false;

  template <class Op>
  __device__ __forceinline__ NoHopperWatch(const Op&, const WarpRows&) {}
  __device__ __forceinline__ void look(unsigned char*, int) {}
};

}  // namespace petl::cuda
