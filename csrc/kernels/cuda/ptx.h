// Everything that CUDA C++ has no word for, behind named functions: the only file with PTX in it. The host emulator
// (csrc/emulator) defines functions of the same names and compiles the kernels without this file's bodies.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__

namespace petl::cuda {

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Where something lies in shared memory.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Makes the compiler keep a value in a register where it would rather find it again and again from the thread's number,
// inside of loops.
__device__ __forceinline__ void keep(SharedAddress& value) { asm volatile("" : "+r"(value)); }

// The same address, kept in a register: the compiler would find it anew at each of its uses. For load_matrices and
// copy_async; where it points is forgotten, so that other accesses would be slower.
template <class T>
__device__ __forceinline__ T* keep_address(T* shared) {
  asm volatile("" : "+l"(shared));
  return shared;
}

// Two floats rounded to nearest, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float2 unpack_float16(uint32_t packed) {
  float2 values;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(packed));
  return values;
}

// The greater one; NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float greater;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(a), "f"(b));
  return greater;
}

// Four 8 x 8 matrices of 16-bit elements. Lane i names row i % 8 of matrix i / 8, 16 bytes in shared memory; lane i
// receives of each matrix elements 2 (i % 4) and the next of row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&parts)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&parts)[4], const void* row) {
  load_matrices(parts, shared_address(row));
}

// The same of the transposed matrices: lane i receives of each elements 2 (i % 4) and the next of column i / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&parts)[4], const void* row) {
  const SharedAddress address = shared_address(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(address)
               : "memory");
}

// sums [16, 8] += left [16, 16] right [16, 8], spread over the warp as PTX's m16n8k16 says.
__device__ __forceinline__ void multiply_bfloat16(float (&sums)[4], const uint32_t (&left)[4],
                                                  const uint32_t (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

__device__ __forceinline__ void multiply_float16(float (&sums)[4], const uint32_t (&left)[4],
                                                 const uint32_t (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// Begins to copy 16 bytes to shared memory, past the registers; zeros where `valid` is false, and `global` is not read.
__device__ __forceinline__ void copy_async(SharedAddress shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async(SharedAddress shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  copy_async(shared_address(shared), global, valid);
}

// Ends a group of copies, possibly an empty one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are still under way; other threads' copies need a barrier too.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace petl::cuda

#endif
