// A tiled product as real kernels have it (a ring of asynchronous copies, ldmatrix, mma), and its versions with one
// planted fault each.
#pragma once
#include "kernels/cuda/ptx.h"

namespace faults {

enum class Fault {
  none,
  no_wait,                  // copies are not waited for
  waits_for_too_few,        // the newest group, which holds the tile, may still be under way
  no_barrier_after_wait,    // other threads' copies may still be under way
  no_barrier_before_reuse,  // other warps may still read what new copies overwrite
  left_parts_swapped,       // registers 1 and 2 of the left fragment
  right_not_transposed,     // the fragment of the transposed matrix
  sums_of_other_rows,       // the lower rows' sums are written to the upper rows
  no_zeros_at_edge,         // rows beyond the matrix are left as they were
  global_overrun,           // rows beyond the matrix are copied
  shared_overrun,           // the ring is one row too short
};

constexpr int kTile = 32, kDepth = 32, kStages = 2, kThreads = 128;
constexpr int kStride = kDepth + 8;  // elements; the padding spreads rows over the banks
constexpr int kTileElements = kTile * kStride;
constexpr int kSharedBytes = kStages * 2 * kTileElements * static_cast<int>(sizeof(uint16_t));

constexpr int shared_bytes(Fault fault) {
  return kSharedBytes - (fault == Fault::shared_overrun ? kStride * static_cast<int>(sizeof(uint16_t)) : 0);
}

// out [rows, columns] = left [rows, inner] right [columns, inner]^T, in bfloat16; inner is a multiple of 8.
struct Product {
  const uint16_t* left;
  const uint16_t* right;
  float* out;
  int rows, columns, inner;
};

template <Fault kFault>
__device__ __forceinline__ void copy_tile(uint16_t* shared, const uint16_t* from, int first, int rows, int inner,
                                          int begin) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth / 8; i += kThreads) {
    const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
    const bool row_valid = first + row < rows || kFault == Fault::global_overrun;
    const bool valid = row_valid && begin + column < inner;
    if (kFault == Fault::no_zeros_at_edge && !valid) continue;
    const int64_t offset = static_cast<int64_t>(first + row) * inner + begin + column;
    petl::cuda::copy_async(shared + row * kStride + column, valid ? from + offset : from, valid);
  }
}

template <Fault kFault>
__device__ __forceinline__ void wait_for_tile(bool another_follows) {
  if constexpr (kFault == Fault::no_wait) return;
  if (another_follows || kFault == Fault::waits_for_too_few) {
    petl::cuda::wait_for_copies<1>();
  } else {
    petl::cuda::wait_for_copies<0>();
  }
}

// Each of the four warps has a quarter of the tile, 16 x 16.
template <Fault kFault>
__device__ __forceinline__ void multiply_tiles(float (&sums)[2][4], const uint16_t* left, const uint16_t* right) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int left_row = warp / 2 * 16 + lane % 16, left_column = lane / 16 * 8;
  const int right_row = warp % 2 * 16 + lane / 16 * 8 + lane % 8, right_column = lane / 8 % 2 * 8;
  for (int inner = 0; inner < kDepth; inner += 16) {
    uint32_t left_parts[4], right_parts[4];
    petl::cuda::load_matrices(left_parts, left + left_row * kStride + left_column + inner);
    const uint16_t* right_address = right + right_row * kStride + right_column + inner;
    if constexpr (kFault == Fault::right_not_transposed) {
      petl::cuda::load_matrices_transposed(right_parts, right_address);
    } else {
      petl::cuda::load_matrices(right_parts, right_address);
    }
    constexpr bool kSwapped = kFault == Fault::left_parts_swapped;
    const uint32_t fragment[4] = {left_parts[0], left_parts[kSwapped ? 2 : 1], left_parts[kSwapped ? 1 : 2],
                                  left_parts[3]};
    for (int half = 0; half < 2; ++half) {
      const uint32_t columns[2] = {right_parts[half * 2], right_parts[half * 2 + 1]};
      petl::cuda::multiply_bfloat16(sums[half], fragment, columns);
    }
  }
}

template <Fault kFault>
__device__ __forceinline__ void store(const Product& product, const float (&sums)[2][4]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int lower = kFault == Fault::sums_of_other_rows ? 1 - i / 2 : i / 2;
      const int row = static_cast<int>(blockIdx.x) * kTile + warp / 2 * 16 + lane / 4 + lower * 8;
      const int column = static_cast<int>(blockIdx.y) * kTile + warp % 2 * 16 + half * 8 + lane % 4 * 2 + i % 2;
      if (row < product.rows && column < product.columns) {
        product.out[static_cast<int64_t>(row) * product.columns + column] = sums[half][i];
      }
    }
  }
}

template <Fault kFault>
__global__ void __launch_bounds__(kThreads) multiply(const Product product) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(petl::cuda::shared_memory());
  const auto stage = [&](int step) { return shared + step % kStages * 2 * kTileElements; };
  const auto copy = [&](int step) {
    const int row = static_cast<int>(blockIdx.x) * kTile, column = static_cast<int>(blockIdx.y) * kTile;
    copy_tile<kFault>(stage(step), product.left, row, product.rows, product.inner, step * kDepth);
    copy_tile<kFault>(stage(step) + kTileElements, product.right, column, product.columns, product.inner,
                      step * kDepth);
    petl::cuda::commit_copies();
  };
  float sums[2][4] = {};
  const int steps = (product.inner + kDepth - 1) / kDepth;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy(step + 1);
    wait_for_tile<kFault>(step + 1 < steps);
    if constexpr (kFault != Fault::no_barrier_after_wait) __syncthreads();
    multiply_tiles<kFault>(sums, stage(step), stage(step) + kTileElements);
    if constexpr (kFault != Fault::no_barrier_before_reuse) __syncthreads();
  }
  store<kFault>(product, sums);
}

}  // namespace faults
