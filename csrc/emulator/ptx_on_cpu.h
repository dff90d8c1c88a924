// The functions of kernels/cuda/ptx.h, with the registers of each lane as the PTX ISA lays them out.
#pragma once
#include "emulator/block.h"
#include "emulator/half.h"
#include "emulator/warp.h"

namespace petl::cuda {

inline unsigned char* shared_memory() { return emulator::running->shared_memory(); }

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<SharedAddress>(pointer); }

inline void keep(SharedAddress&) {}

template <class T>
T* keep_address(T* shared) {
  return shared;
}

inline uint32_t pack_bfloat16(float low, float high) {
  return emulator::to_bfloat16(low) | emulator::to_bfloat16(high) << 16;
}

inline uint32_t pack_float16(float low, float high) {
  return emulator::to_float16(low) | emulator::to_float16(high) << 16;
}

inline float2 unpack_float16(uint32_t packed) {
  return {emulator::Float16::widen(packed & 0xffff), emulator::Float16::widen(packed >> 16)};
}

inline float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

inline void load_matrices(uint32_t (&parts)[4], const void* row, const emulator::Place& place = emulator::here()) {
  emulator::load_matrices(parts, row, place);
}

inline void load_matrices(uint32_t (&parts)[4], SharedAddress row, const emulator::Place& place = emulator::here()) {
  emulator::load_matrices(parts, reinterpret_cast<const void*>(row), place);
}

inline void load_matrices_transposed(uint32_t (&parts)[4], const void* row,
                                     const emulator::Place& place = emulator::here()) {
  emulator::load_matrices_transposed(parts, row, place);
}

inline void multiply_bfloat16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                              const emulator::Place& place = emulator::here()) {
  emulator::multiply_bfloat16(sums, left, right, place);
}

inline void multiply_float16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                             const emulator::Place& place = emulator::here()) {
  emulator::multiply_float16(sums, left, right, place);
}

inline void copy_async(void* shared, const void* global, bool valid, const emulator::Place& place = emulator::here()) {
  emulator::running->copy_async(shared, global, valid, place);
}

inline void copy_async(SharedAddress shared, const void* global, bool valid,
                       const emulator::Place& place = emulator::here()) {
  emulator::running->copy_async(reinterpret_cast<void*>(shared), global, valid, place);
}

inline void copy_async(SharedAddress shared, const void* global, const emulator::Place& place = emulator::here()) {
  emulator::running->copy_async(reinterpret_cast<void*>(shared), global, true, place);
}

inline void commit_copies() { emulator::running->commit_copies(); }

template <int kPending>
void wait_for_copies() {
  emulator::running->wait_for_copies(kPending);
}

}  // namespace petl::cuda
