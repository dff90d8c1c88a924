// Working memory in parts.
#pragma once
#include <cstdint>

#include "kernels/cpu/scratch.h"

namespace petl::cpu {

// Shares out a buffer, in whole cache lines. Without a buffer it only counts.
class Partition {
 public:
  explicit Partition(float* begin = nullptr) : begin_(begin) {}

  template <class T = float>
  T* take(int64_t count) {
    float* part = begin_ ? begin_ + floats_ : nullptr;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    floats_ += (bytes + kLine - 1) / kLine * (kLine / static_cast<int64_t>(sizeof(float)));
    return reinterpret_cast<T*>(part);
  }

  int64_t floats() const { return floats_; }

 private:
  static constexpr int64_t kLine = 64;
  float* begin_;
  int64_t floats_ = 0;
};

// The parts of a buffer: what the constructor of Parts takes of a Partition.
template <class Parts, class... Arguments>
Parts parts_of(Scratch& scratch, const Arguments&... arguments) {
  Partition counted;
  Parts(arguments..., counted);
  Partition partition(scratch.reserve(counted.floats()));
  return Parts(arguments..., partition);
}

}  // namespace petl::cpu
