// The body of one path's source file: all kernels, compiled for one instruction set into a namespace of their own, so
// that the linker cannot mix code of two paths. The including file defines
//   PETL_PATH            the name
//   PETL_TARGET          the target attribute's text, or nothing for what the compiler is set to
//   PETL_VECTOR_BYTES    the width of a vector register
//   PETL_TILE_ROWS, PETL_PANEL_VECTORS    the accumulators of the microkernel: rows x vectors
//   PETL_AVX512_BF16 or PETL_NEON_BF16    where the processor multiplies pairs of bfloat16 itself, and by which
//                        instructions
//   PETL_MATRIX_PRODUCTS      where it also does so in matrix registers
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#if defined(PETL_AVX512_BF16)
#include <immintrin.h>
#elif defined(PETL_NEON_BF16)
#include <arm_neon.h>
#endif
#if defined(PETL_AVX512_BF16) || defined(PETL_NEON_BF16)
#define PETL_BFLOAT16_PRODUCTS
#endif

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/partition.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/work.h"

#define PETL_PRAGMA(text) _Pragma(#text)
#define PETL_NAME(text) PETL_NAME_OF(text)
#define PETL_NAME_OF(text) #text

#ifdef PETL_TARGET
#ifdef __clang__
#define PETL_BEGIN_TARGET(text) PETL_PRAGMA(clang attribute push(__attribute__((target(text))), apply_to = function))
#define PETL_END_TARGET PETL_PRAGMA(clang attribute pop)
#else
#define PETL_BEGIN_TARGET(text) PETL_PRAGMA(GCC push_options) PETL_PRAGMA(GCC target(text))
#define PETL_END_TARGET PETL_PRAGMA(GCC pop_options)
#endif
PETL_BEGIN_TARGET(PETL_TARGET)
#endif

namespace petl::cpu::PETL_PATH {
namespace {
// The parts have no include guards, since each path includes them once, inside its own namespace. Each needs those
// above it.
// clang-format off
#include "kernels/cpu/vector.inl"
#include "kernels/cpu/gemm.inl"
#include "kernels/cpu/pairs.inl"
#ifdef PETL_MATRIX_PRODUCTS
#include "kernels/cpu/matrix_registers.inl"
#endif
#include "kernels/cpu/tiles.inl"
#include "kernels/cpu/activation.inl"
#include "kernels/cpu/dropout.inl"
#include "kernels/cpu/row_products.inl"
#include "kernels/cpu/layer_norm.inl"
#include "kernels/cpu/exact_sums.inl"
#include "kernels/cpu/weight_gradient.inl"
#include "kernels/cpu/adapter.inl"
#include "kernels/cpu/adapter_backward.inl"
#include "kernels/cpu/apt.inl"
#include "kernels/cpu/attention_pool.inl"
#include "kernels/cpu/attention_pool_backward.inl"
#if defined(PETL_TIME_WORK) && defined(PETL_AVX512_BF16)
#include "kernels/cpu/peak.inl"
#endif
// clang-format on
}  // namespace

extern const Kernels kernels;
const Kernels kernels{PETL_NAME(PETL_PATH), adapter_forward,        adapter_backward,       apt_forward,
                      apt_backward,         attention_pool_forward, attention_pool_backward};

#if defined(PETL_TIME_WORK) && defined(PETL_MATRIX_PRODUCTS)
extern "C" __attribute__((visibility("default"))) double petl_peak_of_matrices() { return peak_of_matrices(); }
#elif defined(PETL_TIME_WORK) && defined(PETL_AVX512_BF16)
extern "C" __attribute__((visibility("default"))) double petl_peak_of_floats() {
  return peak_of_products<FloatArithmetic>();
}
extern "C" __attribute__((visibility("default"))) double petl_peak_of_pairs() {
  return peak_of_products<PairArithmetic>();
}
#endif
}  // namespace petl::cpu::PETL_PATH

#ifdef PETL_TARGET
PETL_END_TARGET
#endif
