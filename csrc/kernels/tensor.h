// What a kernel knows of a tensor: no torch from here on down.
#pragma once
#include <cstdint>

namespace petl {

enum class DType { float32, bfloat16, float16 };

// A matrix whose rows are contiguous and `stride` elements apart.
struct ConstRows {
  const void* data;
  int64_t stride;
  DType dtype;
};

// A matrix to be written: its rows lie back to back.
struct Rows {
  void* data;
  DType dtype;
};

}  // namespace petl
