#include "kernels/cpu/scratch.h"

#include <new>

namespace petl::cpu {

namespace {
constexpr std::align_val_t kCacheLine{64};
}

Scratch::~Scratch() { release(); }

void Scratch::release() {
  operator delete(data_, kCacheLine);
  data_ = nullptr;
  bytes_ = 0;
}

float* Scratch::reserve(size_t count) {
  const size_t bytes = count * sizeof(float);
  if (bytes > bytes_) {
    release();
    data_ = static_cast<float*>(operator new(bytes, kCacheLine));
    bytes_ = bytes;
  }
  return data_;
}

void Scratch::release_excess() {
  if (bytes_ > kKept) release();
}

Scratch& call_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Scratch& tile_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace petl::cpu
