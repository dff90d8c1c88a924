// Working memory that outlives a call. Allocating it anew costs more than a small op: pages are mapped and cleared
// again.
#pragma once
#include <cstddef>

namespace petl::cpu {

// One thread's buffer. It grows to what the largest call needed, but keeps no more than kKept bytes between calls.
class Scratch {
 public:
  static constexpr size_t kKept = size_t{8} << 20;

  ~Scratch();
  // At least `count` floats, aligned to a cache line, uninitialized. Throws std::bad_alloc.
  float* reserve(size_t count);
  void release_excess();

 private:
  void release();
  float* data_ = nullptr;
  size_t bytes_ = 0;
};

// What one call shares among its threads, and what a thread needs for one tile: two, since the calling thread needs
// both.
Scratch& call_scratch();
Scratch& tile_scratch();

}  // namespace petl::cpu
