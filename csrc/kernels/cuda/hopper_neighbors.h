// A lane's neighbors in a row of kept values (neighbors_from): eight, or four where inner columns end with 16.
#pragma once
#include "kernels/cuda/hopper_rows.h"

namespace petl::cuda {

// Where those of the lane's two lines lie in matrices [R, width].
template <int kInner>
class NeighborRows {
 public:
  __device__ __forceinline__ NeighborRows(const WarpRows& rows, int width) : width_(width) {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      first_[line] = rows.line(line) * width + unit_of_lane<kInner>(0);
      has_[line] = rows.has_line(line);
    }
  }

  // From a block's first unit on. The distance to those of block 0 is a constant, but where four end the row.
  __device__ __forceinline__ int64_t at(int block, int line) const {
    const int64_t first = first_[line] + block * 8;
    return neighbors_from<kInner>(block) == 8 ? first : first - static_cast<int>(threadIdx.x) % 4 * 4;
  }
  __device__ __forceinline__ bool has(int block, int line) const {
    return has_[line] && (block * 8 + 32 <= hopper_least_inner(kInner) || unit_of_lane<kInner>(block) < width_);
  }

  __device__ __forceinline__ int width() const { return width_; }

  // As they lie in memory: eight, or four and zeros. Zeros where there are none.
  template <class T>
  __device__ __forceinline__ Packed<T> load(const T* matrix, int block, int line) const {
    if (neighbors_from<kInner>(block) == 8) return load_if(has(block, line), matrix + at(block, line));
    Packed<T> packed = {};
    if (!has(block, line)) return packed;
    if constexpr (sizeof(T) == 4) {
      packed.words[0] = *reinterpret_cast<const uint4*>(matrix + at(block, line));
    } else {
      const uint2 four = *reinterpret_cast<const uint2*>(matrix + at(block, line));
      packed.words[0] = make_uint4(four.x, four.y, 0, 0);
    }
    return packed;
  }

  template <class T>
  __device__ __forceinline__ void store(T* matrix, int block, int line, const uint32_t (&pairs)[4]) const {
    if (!has(block, line)) return;
    if (neighbors_from<kInner>(block) == 8) {
      *reinterpret_cast<uint4*>(matrix + at(block, line)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
      *reinterpret_cast<uint2*>(matrix + at(block, line)) = make_uint2(pairs[0], pairs[1]);
    }
  }

 private:
  int64_t first_[2];
  bool has_[2];
  int width_;
};

// Calls visit(block, line, values) for the lane's neighbors in a matrix, but for groups of 32 columns that are all
// beyond its width: a branch that has ptxas take one group after the other, and not run out of registers. It must take
// it that what visit stores may be what is loaded next; so as many loads are under way as kAhead says.
template <int kInner, class T, class Visit>
__device__ __forceinline__ void visit_neighbors(const NeighborRows<kInner>& where, const T* matrix, Visit visit) {
  constexpr int kGroups = (kInner + 31) / 32, kAhead = sizeof(T) == 4 ? 1 : 2;
  Packed<T> next[kAhead][2];
#pragma unroll
  for (int group = -kAhead; group < kGroups; ++group) {
    Packed<T> now[2] = {};
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      if (group >= 0) now[line] = next[group % kAhead][line];
      if (group + kAhead < kGroups) {
        next[(group + kAhead) % kAhead][line] = where.load(matrix, (group + kAhead) * 4, line);
      }
    }
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      if (group < 0 || group * 32 >= where.width()) continue;
      float values[8];
      unpack(now[line], values);
      visit(group * 4, line, values);
    }
  }
}

// The lane's sums of a line in the blocks of 8 columns that its neighbors are in.
template <int kSums>
__device__ __forceinline__ void get_neighbors(const float (&sums)[kSums], int block, int line, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool exists = i < neighbors_from<2 * kSums>(block);
    values[i] = exists ? sums[(block + i / 2) * 4 + line * 2 + i % 2] : 0;
  }
}

// The left operand of the next product is what the sums become, pair by pair.
template <int kSteps>
__device__ __forceinline__ void set_neighbors(uint32_t (&hidden)[kSteps][4], int block, int line,
                                              const uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (2 * i < neighbors_from<16 * kSteps>(block)) hidden[(block + i) / 2][(block + i) % 2 * 2 + line] = pairs[i];
  }
}

template <class T>
__device__ __forceinline__ void pack_pairs(const float (&values)[8], uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack_pair(values[2 * i], values[2 * i + 1], T{});
}

// A lane's share of a sum over all rows becomes the warp's, in the warp's own element.
__device__ __forceinline__ void store_share(double share, double* shares, const WarpRows& rows) {
  share = sum_warp(share);
  if (threadIdx.x % 32 == 0 && rows.first < rows.R) shares[rows.first / kWarpRows] = share;
}

// So many elements have one.
constexpr int64_t hopper_shares(int64_t R) { return (R + kWarpRows - 1) / kWarpRows; }

}  // namespace petl::cuda
