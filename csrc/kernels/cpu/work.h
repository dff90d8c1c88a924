// Where the time of a call goes: the kernels name what they do, and a build with PETL_TIME_WORK, which
// bench/cpu_shares.py makes, counts the processor's ticks for each name. In any other build nothing of it is left.
#pragma once
#include <cstdint>
#ifdef PETL_TIME_WORK
#include <x86intrin.h>
#endif

namespace petl::cpu {

// What inner work takes is not counted as its surroundings' too.
enum class Work {
  outside,        // of the kernels
  rest,           // of a kernel
  products,       // the microkernels alone
  packing,        // right operands: weights, and rows for the weights' gradients
  conversions,    // left operands
  normalization,  // LayerNorm's statistics and values
  activations,    // and what else is done to hidden units and scores
  results,        // from sums to tensors
  column_sums,    // the biases' gradients, and what ends the weights'
  count
};

#ifdef PETL_TIME_WORK
// Of one thread: measurements have no more.
struct Ticks {
  uint64_t of[static_cast<int>(Work::count)] = {};
  uint64_t since = __rdtsc();
  Work now = Work::outside;

  void turn_to(Work work) {
    const uint64_t ticks = __rdtsc();
    of[static_cast<int>(now)] += ticks - since;
    since = ticks;
    now = work;
  }
};
extern Ticks ticks;

class Timed {
 public:
  explicit Timed(Work work) : outer_(ticks.now) { ticks.turn_to(work); }
  ~Timed() { ticks.turn_to(outer_); }

 private:
  Work outer_;
};
#else
struct Timed {
  explicit Timed(Work) {}
};
#endif

}  // namespace petl::cpu
