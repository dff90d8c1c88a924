// The emulator's products and formats: fragments of a warp, loads of matrices, rounding to 16 bits.
#pragma once
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "emulator_checks.h"

namespace emulator_test {

using petl::cuda::shared_memory;

// Registers of a warp

using Multiply = void (*)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

inline void bfloat16_product(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  petl::cuda::multiply_bfloat16(sums, left, right);
}

inline void float16_product(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  petl::cuda::multiply_float16(sums, left, right);
}

// The fragments of the PTX ISA, "Matrix Fragments for mma.m16n8k16": left and sums row-major, right column-major.
template <Multiply kMultiply>
__global__ void multiply_fragments(const uint16_t* left, const uint16_t* right, float* out) {
  const int group = static_cast<int>(threadIdx.x) >> 2, member = static_cast<int>(threadIdx.x) & 3;
  const auto pair = [](const uint16_t* values) { return values[0] | static_cast<uint32_t>(values[1]) << 16; };
  const uint32_t left_parts[4] = {pair(left + group * 16 + member * 2), pair(left + (group + 8) * 16 + member * 2),
                                  pair(left + group * 16 + member * 2 + 8),
                                  pair(left + (group + 8) * 16 + member * 2 + 8)};
  const uint32_t right_parts[2] = {pair(right + group * 16 + member * 2), pair(right + group * 16 + member * 2 + 8)};
  float sums[4];
  const auto element = [&](int i) { return (group + i / 2 * 8) * 8 + member * 2 + i % 2; };
  for (int i = 0; i < 4; ++i) sums[i] = out[element(i)];
  kMultiply(sums, left_parts, right_parts);
  for (int i = 0; i < 4; ++i) out[element(i)] = sums[i];
}

template <Multiply kMultiply>
void test_multiply(const char* name, Pack pack) {
  const std::vector<float> left = small_integers(16 * 16), right = small_integers(8 * 16);
  std::vector<float> out = small_integers(16 * 8), wanted = out;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int inner = 0; inner < 16; ++inner) {
        wanted[row * 8 + column] += left[row * 16 + inner] * right[column * 16 + inner];
      }
    }
  }
  const std::vector<uint16_t> left_bits = packed(left, pack), right_bits = packed(right, pack);
  launch(1, 32, 0, &multiply_fragments<kMultiply>, left_bits.data(), right_bits.data(), out.data());
  expect(out == wanted, name);
}

// Element [row][column] of matrix m is 64 m + 8 row + column.
__global__ void load_four(bool transposed, uint32_t* out) {
  uint16_t* matrices = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = 0; i < 8; ++i) matrices[threadIdx.x * 8 + i] = static_cast<uint16_t>(threadIdx.x * 8 + i);
  __syncwarp();
  uint32_t parts[4];
  if (transposed) {
    petl::cuda::load_matrices_transposed(parts, matrices + threadIdx.x * 8);
  } else {
    petl::cuda::load_matrices(parts, matrices + threadIdx.x * 8);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = parts[i];
}

inline void test_load_matrices() {
  for (const bool transposed : {false, true}) {
    std::vector<uint32_t> out(32 * 4), wanted(32 * 4);
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        const uint32_t major = lane / 4, minor = lane % 4 * 2;
        const uint32_t first = matrix * 64 + (transposed ? minor * 8 + major : major * 8 + minor);
        wanted[lane * 4 + matrix] = first | (first + (transposed ? 8 : 1)) << 16;
      }
    }
    launch(1, 32, 512, &load_four, transposed, out.data());
    expect(out == wanted, transposed ? "load_matrices_transposed" : "load_matrices");
  }
}

// Formats of 16 bits

struct Format {
  const char* name;
  int mantissa_bits, exponent_bits;
  Pack pack;

  double value(uint32_t bits) const {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
    const double mantissa = bits & ((1u << mantissa_bits) - 1), sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
  uint32_t low(double value) const { return pack(static_cast<float>(value), 0) & 0xffff; }
};

// Each value, each midpoint between neighbors (to the even one) and what is next to the midpoints.
inline void test_rounding(const Format& format) {
  bool exact = true, ties = true, near_ties = true;
  for (const uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t bits = 0; bits < format.infinity(); ++bits) {
      const float middle = static_cast<float>((format.value(sign | bits) + format.value(sign | (bits + 1))) / 2);
      exact &= format.low(format.value(sign | bits)) == (sign | bits);
      ties &= format.low(middle) == (sign | (bits + bits % 2));
      near_ties &= format.low(std::nextafter(middle, 0.0f)) == (sign | bits);
      near_ties &= format.low(std::nextafter(middle, sign ? -INFINITY : INFINITY)) == (sign | (bits + 1));
    }
    exact &= format.low(sign ? -INFINITY : INFINITY) == (sign | format.infinity());
  }
  const std::string name = format.name;
  expect(exact, name + ": values that need no rounding");
  expect(ties, name + ": ties go to the even neighbor");
  expect(near_ties, name + ": what is beside a tie goes to the nearer neighbor");
  expect(format.low(std::nanf("")) == 0x7fff, name + ": NaN");
  expect(format.pack(1, 2) == (format.low(1) | format.low(2) << 16), name + ": the first is in the lower half");
}

inline void test_unpacking(const Format& half) {
  bool good = true;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint32_t magnitude = bits & 0x7fff;
    const float2 values = petl::cuda::unpack_float16(bits | 0x3c000000);
    if (magnitude > half.infinity()) {
      good &= std::isnan(values.x);
    } else if (magnitude == half.infinity()) {
      good &= values.x == (bits >> 15 ? -INFINITY : INFINITY);
    } else {
      good &= values.x == half.value(bits) && std::signbit(values.x) == (bits >> 15 != 0);
    }
    good &= values.y == 1 && petl::cuda::unpack_float16(bits << 16).x == 0;
  }
  expect(good, "unpack_float16");
}

}  // namespace emulator_test
