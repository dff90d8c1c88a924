#include <type_traits>

#include "kernels/cuda/gradient_sums.h"
#include "kernels/cuda/ring.h"
#include "kernels/cuda/weight_gradient.h"

namespace petl::cuda {
namespace {

// The problem's number is a constant, and so its fields need no registers.
template <class Shape, int kProblem, Extra kExtra>
__device__ __forceinline__ void sum_slab(const GradientTask<typename Shape::Element>& task) {
  constexpr bool kWide = sizeof(typename Shape::Element) == 4;
  using SlabSums = std::conditional_t<kWide, FloatSums<Shape, kExtra>, TensorCoreSums<Shape, kExtra>>;
  const auto& problem = task.problems[kProblem];
  const GradientPart part = GradientPart::of<Shape>(task, kProblem);
  SlabSums sums(problem, part, task.inner);
  GradientCopies<Shape, SlabSums::kReadsStatistics, kExtra == Extra::none> copies(problem, part, task.D);
  const int chunks = static_cast<int>((part.rows + Shape::kChunk - 1) / Shape::kChunk);
  stream_chunks<Shape::kStages>(
      chunks, [&](int place) { copies.copy(place); }, [&](int place) { sums.arrive(place); },
      [&](int place) { sums.multiply(place); });
  sums.write(problem, part, task.inner, task.D);
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    gradient_slabs(const __grid_constant__ GradientTask<typename Shape::Element> task) {
  if (static_cast<int>(blockIdx.z) < task.slabs) {
    sum_slab<Shape, 0, Extra::none>(task);
  } else {
    sum_slab<Shape, 1, Extra::none>(task);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    gradient_slabs_with_sums(const __grid_constant__ GradientTask<typename Shape::Element> task) {
  if (static_cast<int>(blockIdx.z) >= task.slabs) {
    sum_slab<Shape, 1, Extra::right>(task);
  } else if (task.problems[0].statistics) {
    sum_slab<Shape, 0, Extra::left_normalized>(task);
  } else {
    sum_slab<Shape, 0, Extra::left>(task);
  }
}

template <class Shape, class Kernel>
int launch_shape(Queue queue, const GradientTask<typename Shape::Element>& task, Kernel kernel) {
  const int64_t tiles = divide_up(task.D, Shape::kColumns), least = task.has_sums() ? Shape::kLeftParts : 1;
  const dim3 blocks(static_cast<unsigned>(tiles > least ? tiles : least),
                    static_cast<unsigned>(divide_up(task.inner, Shape::kInner)),
                    static_cast<unsigned>(task.slabs * task.problem_count));
  return launch(queue, {blocks, Shape::kThreads, GradientChunk<Shape>::kSharedBytes}, kernel, task);
}

template <class Shape>
int launch_products(Queue queue, const GradientTask<typename Shape::Element>& task) {
  return launch_shape<Shape>(queue, task, &gradient_slabs<Shape>);
}

template <class Shape>
int launch_products_and_sums(Queue queue, const GradientTask<typename Shape::Element>& task) {
  return launch_shape<Shape>(queue, task, &gradient_slabs_with_sums<Shape>);
}

// By gradient_tile's sizes.
template <class T>
int launch_tile(Queue queue, const GradientTask<T>& task, int inner) {
  if (!task.has_sums()) {
    if (inner == 64) return launch_products<GradientShape<T, 4, 4>>(queue, task);
    if (inner == 128) return launch_products<GradientShape<T, 8, 3>>(queue, task);
    return launch_products<GradientShape<T, 13, 3>>(queue, task);
  }
  if (inner == 64) return launch_products_and_sums<GradientShape<T, 4, 4>>(queue, task);
  if (inner == 96) return launch_products_and_sums<GradientShape<T, 6, 4>>(queue, task);
  if (inner == 128) return launch_products_and_sums<GradientShape<T, 8, 3>>(queue, task);
  return launch_products_and_sums<GradientShape<T, 12, 3>>(queue, task);
}

int launch_tile(Queue queue, const GradientTask<float>& task, int inner) {
  using Low = FloatGradientShape<2, 4>;
  using High = FloatGradientShape<4, 2>;
  if (!task.has_sums()) return inner == 64 ? launch_products<Low>(queue, task) : launch_products<High>(queue, task);
  return inner == 64 ? launch_products_and_sums<Low>(queue, task) : launch_products_and_sums<High>(queue, task);
}

}  // namespace

template <class T>
int launch_gradients(Queue queue, GradientTask<T> task) {
  task.slab_rows = round_up(divide_up(task.R, task.slabs), 32);
  return launch_tile(queue, task, gradient_tile<T>(task.inner, task.has_sums()).inner);
}

template int launch_gradients(Queue, GradientTask<float>);
template int launch_gradients(Queue, GradientTask<Bfloat16>);
template int launch_gradients(Queue, GradientTask<Float16>);

}  // namespace petl::cuda
