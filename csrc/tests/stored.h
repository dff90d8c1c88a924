// Random values as they lie in memory in a kernel's dtypes, and results compared with float64.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace stored {

using petl::DType;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline Floats random_floats(size_t count, float scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, scale);
  Floats values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

// Floats as they lie in memory in one of the types that a kernel reads and writes.
class Stored {
 public:
  Stored(const Floats& values, DType dtype) : dtype_(dtype), bytes_(values.size() * (is_wide() ? 4 : 2)) {
    if (is_wide()) {
      std::memcpy(bytes_.data(), values.data(), bytes_.size());
      return;
    }
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      const uint16_t half = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
      std::memcpy(bytes_.data() + 2 * i, &half, 2);
    }
  }

  Floats values() const {
    Floats values(bytes_.size() / (is_wide() ? 4 : 2));
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits = 0;
      const size_t size = is_wide() ? 4 : 2;
      std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, bytes_.data() + size * i, size);
      std::memcpy(&values[i], &bits, 4);
    }
    return values;
  }

  petl::ConstRows rows(int64_t width) const { return {bytes_.data(), width, dtype_}; }
  petl::Rows target() { return {bytes_.data(), dtype_}; }

 private:
  bool is_wide() const { return dtype_ == DType::float32; }
  DType dtype_;
  std::vector<char> bytes_;
};

// An element of rows that lie so, in float32 or bfloat16.
inline double element_of(const petl::ConstRows& rows, int64_t row, int64_t column) {
  const int64_t size = rows.dtype == DType::float32 ? 4 : 2;
  uint32_t bits = 0;
  float value;
  std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size,
              static_cast<const char*>(rows.data) + size * (row * rows.stride + column), size);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline Floats rounded(const Floats& values, DType dtype) { return Stored(values, dtype).values(); }

inline bool close(const std::string& name, const Floats& actual, const Doubles& wanted, double tolerance) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::abs(actual[i] - wanted[i]);
    error = std::max(error, std::isnan(difference) ? INFINITY : difference);
    largest = std::max(largest, std::abs(wanted[i]));
  }
  const bool good = error <= tolerance * largest;
  if (!good) std::printf("%s: error %g of %g\n", name.c_str(), error, largest);
  return good;
}

}  // namespace stored
