// What the lanes of a warp do together. Each function is called by all lanes of the mask, at one line of the kernel.
#pragma once
#include <cstdint>
#include <cstring>

#include "emulator/block.h"

namespace emulator {

void synchronize(uint32_t mask, const Place& place);

// The lanes for which the predicate holds.
uint32_t vote(uint32_t mask, bool predicate, const Place& place);

// The bits of the source lane, or NaN in every format if that does not take part.
uint64_t shuffle_bits(uint32_t mask, uint64_t bits, unsigned source, const Place& place);

template <class T>
T shuffle(uint32_t mask, T value, int source, const Place& place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(mask, bits, static_cast<unsigned>(source), place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Of four 8 x 8 matrices of 16-bit elements, whose rows the lanes name, what each lane receives.
void load_matrices(uint32_t (&parts)[4], const void* row, const Place& place);
void load_matrices_transposed(uint32_t (&parts)[4], const void* row, const Place& place);

// sums [16, 8] += left [16, 16] right [16, 8]. Products are exact and sums are rounded to float32 one by one. The
// device's order differs, and it cuts off bits of a sum's smaller terms: results agree to a few units in float32's last
// place of the largest term.
void multiply_bfloat16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], const Place& place);
void multiply_float16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], const Place& place);

}  // namespace emulator
