// The formats of 16 bits.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulator {

constexpr uint32_t kSign = 0x80000000, kInfinity = 0x7f800000, kNan16 = 0x7fff;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `bits` without the lowest `dropped` ones, rounded to nearest, ties to even.
inline uint32_t rounded_shift(uint32_t bits, unsigned dropped) {
  return (bits + (uint32_t{1} << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped;
}

// The device makes every NaN this one.
inline uint32_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return (bits & ~kSign) > kInfinity ? kNan16 : rounded_shift(bits, 16);
}

inline uint32_t to_float16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & ~kSign, sign = (bits & kSign) >> 16;
  if (magnitude > kInfinity) return kNan16;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and more: infinity
  if (magnitude >= 0x38800000) return sign | rounded_shift(magnitude - 0x38000000, 13);
  // Below 2^-14, multiples of 2^-24: the sum's last place is that.
  return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
}

struct Bfloat16 {
  static float widen(uint32_t bits) { return float_of(bits << 16); }
};

struct Float16 {
  static float widen(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
    const float subnormal = float_of(magnitude + 0x38800000) - float_of(0x38800000);
    const uint32_t normal = magnitude + (magnitude >= 0x0f800000 ? 0x70000000 : 0x38000000);
    return float_of(sign | (magnitude < 0x00800000 ? bits_of(subnormal) : normal));
  }
};

}  // namespace emulator
