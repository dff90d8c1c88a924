// The products of a warpgroup, with the long lists of their operands. A part of hopper_ptx.h.
#pragma once
#include <type_traits>

#include "kernels/cuda/elements.h"

namespace petl::cuda {

// Products of a warpgroup, sums [64, N] += left [64, 16] right [N, 16]^T, of elements T. Warp w has rows 16 w to
// 16 w + 15 of the sums; among its lanes they lie as those of mma.sync, 8 columns after 8 columns, and so do the
// registers of `left`.

// The compiler does not know that products write the sums later than the instruction stands. What it computes from
// them, or for them, must not pass the fence or the wait.
template <int kSums>
__device__ __forceinline__ void hold(float (&sums)[kSums]) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

// Before the first product after the sums, or left's registers, were touched.
template <int kSums>
__device__ __forceinline__ void fence_products(float (&sums)[kSums]) {
  hold(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups are under way. The sums may be used when none is.
template <int kPending, int kSums>
__device__ __forceinline__ void wait_for_products(float (&sums)[kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  if constexpr (kPending == 0) hold(sums);
}

// The lists of operands that so many sums make.
#define PETL_NAMES_32                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21" \
  ", %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PETL_NAMES_48 \
  PETL_NAMES_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PETL_NAMES_64 \
  PETL_NAMES_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PETL_NAMES_96                                                                                    \
  PETL_NAMES_64                                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83" \
  ", %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PETL_NAMES_104 \
  PETL_NAMES_96        \
  ", %96, %97, %98, %99, %100, %101, %102, %103"
#define PETL_NAMES_128                                                                               \
  PETL_NAMES_104                                                                                     \
  ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PETL_SUMS_8(s, i)                                                                                           \
  "+f"((s)[i]), "+f"((s)[(i) + 1]), "+f"((s)[(i) + 2]), "+f"((s)[(i) + 3]), "+f"((s)[(i) + 4]), "+f"((s)[(i) + 5]), \
      "+f"((s)[(i) + 6]), "+f"((s)[(i) + 7])
#define PETL_SUMS_16(s, i) PETL_SUMS_8(s, i), PETL_SUMS_8(s, (i) + 8)
#define PETL_SUMS_32(s) PETL_SUMS_16(s, 0), PETL_SUMS_16(s, 16)
#define PETL_SUMS_48(s) PETL_SUMS_32(s), PETL_SUMS_16(s, 32)
#define PETL_SUMS_64(s) PETL_SUMS_48(s), PETL_SUMS_16(s, 48)
#define PETL_SUMS_96(s) PETL_SUMS_64(s), PETL_SUMS_16(s, 64), PETL_SUMS_16(s, 80)
#define PETL_SUMS_104(s) PETL_SUMS_96(s), PETL_SUMS_8(s, 96)
#define PETL_SUMS_128(s) PETL_SUMS_104(s), PETL_SUMS_8(s, 104), PETL_SUMS_16(s, 112)

// Both operands from shared memory. `columns` is twice the number of sums, `left` and `right` are the operands'
// numbers.
#define PETL_MULTIPLY_TILES(columns, type, sums_count, left, right)                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type " {" PETL_NAMES_##sums_count \
               "}, %" #left ", %" #right ", 1, 1, 1, 0, 0;"                                              \
               : PETL_SUMS_##sums_count(sums)                                                            \
               : "l"(left_tile), "l"(right_tile))

#define PETL_MULTIPLY_TILES_OF(type)               \
  if constexpr (kSums == 32) {                     \
    PETL_MULTIPLY_TILES(64, type, 32, 32, 33);     \
  } else if constexpr (kSums == 48) {              \
    PETL_MULTIPLY_TILES(96, type, 48, 48, 49);     \
  } else if constexpr (kSums == 64) {              \
    PETL_MULTIPLY_TILES(128, type, 64, 64, 65);    \
  } else if constexpr (kSums == 96) {              \
    PETL_MULTIPLY_TILES(192, type, 96, 96, 97);    \
  } else if constexpr (kSums == 104) {             \
    PETL_MULTIPLY_TILES(208, type, 104, 104, 105); \
  } else {                                         \
    PETL_MULTIPLY_TILES(256, type, 128, 128, 129); \
  }

template <class T, int kSums>
__device__ __forceinline__ void multiply_tiles(float (&sums)[kSums], uint64_t left_tile, uint64_t right_tile) {
  static_assert(kSums == 32 || kSums == 48 || kSums == 64 || kSums == 96 || kSums == 104 || kSums == 128);
  if constexpr (std::is_same_v<T, Bfloat16>) {
    PETL_MULTIPLY_TILES_OF("bf16.bf16")
  } else {
    PETL_MULTIPLY_TILES_OF("f16.f16")
  }
}

#define PETL_MULTIPLY_REGISTERS(type)                                                                       \
  asm volatile("{.reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type \
               " {" PETL_NAMES_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;}"                            \
               : PETL_SUMS_32(sums)                                                                         \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right_tile), "r"(accumulate))

// The left operand from registers, 64 columns. With `accumulate` zero (a constant) the sums begin with these products.
template <class T>
__device__ __forceinline__ void multiply_registers(float (&sums)[32], const uint32_t (&left)[4], uint64_t right_tile,
                                                   int accumulate) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    PETL_MULTIPLY_REGISTERS("bf16.bf16");
  } else {
    PETL_MULTIPLY_REGISTERS("f16.f16");
  }
}

#undef PETL_MULTIPLY_REGISTERS
#undef PETL_MULTIPLY_TILES_OF
#undef PETL_MULTIPLY_TILES

}  // namespace petl::cuda
