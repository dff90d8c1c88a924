// Gradients of weights: left^T right [inner, D], summed over all rows. The rows are cut into slabs, whose number
// depends on the sizes alone; each slab's sums go to the workspace, and a second kernel adds them in order: bit-equal
// runs.
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
  const RowStatistics* statistics;  // [R]: right is normalized by them; null: it is not
  float* sums;                      // [slabs, inner, D]
  float* left_sums;                 // [slabs, inner], sums of left over the rows; null: not wanted
  float* right_sums;                // [slabs, D], the same of right
};

template <class T>
struct GradientTask {
  static constexpr int kProblems = 2;
  GradientProblem<T> problems[kProblems];
  int64_t R;
  int D, inner;
  int slabs;
  int64_t slab_rows;
};

// How the rows are cut, given tiles of the sizes in weight_gradient.cu: as many slabs as give some 256 blocks, two for
// each multiprocessor of a large GPU, but none below 256 rows. Of the sizes alone, so that every device and every run
// adds in the same order.
inline int slab_count(int64_t R, int64_t D, int64_t inner, int problems) {
  const int64_t columns = inner <= 64 ? 256 : 128;
  const int64_t blocks_per_slab = divide_up(D, columns) * divide_up(inner, 256) * problems;
  const int64_t wanted = divide_up(256, blocks_per_slab), possible = divide_up(R, 256);
  const int64_t slabs = wanted < possible ? wanted : possible;
  return static_cast<int>(slabs > 0 ? slabs : 1);
}

// The first `problems` of the task's problems.
template <class T>
int launch_gradients(Queue queue, GradientTask<T> task, int problems);

// target[index ... index + 3]: the partial sums that lie `stride` apart, added in order.
__device__ __forceinline__ void add_slabs(const float* sums, int slabs, int64_t stride, int64_t index, float* target) {
  float4 total = {0, 0, 0, 0};
#pragma unroll 4
  for (int slab = 0; slab < slabs; ++slab) {
    const float4 part = *reinterpret_cast<const float4*>(sums + slab * stride + index);
    total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
  }
  *reinterpret_cast<float4*>(target + index) = total;
}

}  // namespace petl::cuda
