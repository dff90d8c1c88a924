// Gradients of weights: left^T right [inner, D], summed over all rows. The rows are cut into slabs, whose number
// depends on the sizes alone; each slab's sums go to the workspace, and a later launch adds them in order
// (slab_sums.h): bit-equal runs.
#pragma once
#include "kernels/cuda/launch.h"
#include "kernels/cuda/layer_norm.h"

namespace petl::cuda {

template <class T>
struct GradientProblem {
  const T* left;        // [R, left_stride]
  int64_t left_stride;  // at least `inner`, in whole 16-byte words
  const T* right;       // [R, D], rows right_stride apart
  int64_t right_stride;
  float* sums;  // [slabs, inner, D]
  // Not more than one of these; null: not wanted.
  float* left_sums;   // [slabs, inner], sums of left over the rows
  float* right_sums;  // [slabs, D], the same of right
  // [R]: right is normalized by them; null: it is not. Only beside left_sums.
  const RowStatistics* statistics;
};

template <class T>
struct GradientTask {
  static constexpr int kProblems = 2;
  GradientProblem<T> problems[kProblems];
  int problem_count;
  int64_t R;
  int D, inner;
  int slabs;
  int64_t slab_rows;

  bool has_sums() const { return problems[0].left_sums || problems[0].right_sums; }
};

// One block of threads computes so much of the [inner, D] sums of a slab.
struct GradientTile {
  int inner, columns;
};

// In 16 bits all of inner up to 208, so that right is read once, and so many columns that left is read three times
// where D is 768: the registers of a multiprocessor are full then. Beside other sums there is room for 192.
template <class T>
inline GradientTile gradient_tile(int64_t inner, bool has_sums) {
  if (sizeof(T) == 4) return inner <= 64 ? GradientTile{64, 256} : GradientTile{128, 128};
  const int64_t part = divide_up(inner, divide_up(inner, has_sums ? 192 : 208));
  if (part <= 64) return {64, 256};
  if (part <= 96 && has_sums) return {96, 256};
  if (part <= 128) return {128, 256};
  return {has_sums ? 192 : 208, 256};
}

// How the rows are cut: as many slabs as give one block, in float32 two, for each of the 132 multiprocessors of an H100
// or H200, but none below 256 rows: the more slabs, the more sums to write and to read again. Of the sizes alone, so
// that every device and every run adds in the same order.
template <class T>
inline int slab_count(int64_t R, int64_t D, int64_t inner, int problems, bool has_sums) {
  const GradientTile tile = gradient_tile<T>(inner, has_sums);
  const int64_t blocks_per_slab = divide_up(D, tile.columns) * divide_up(inner, tile.inner) * problems;
  const int64_t wanted = (sizeof(T) == 4 ? 264 : 132) / blocks_per_slab, possible = divide_up(R, 256);
  const int64_t slabs = wanted < possible ? wanted : possible;
  return static_cast<int>(slabs > 0 ? slabs : 1);
}

template <class T>
int launch_gradients(Queue queue, GradientTask<T> task);

}  // namespace petl::cuda
