// Dropout of eight neighboring columns of a row, which two draws of Philox decide (kernels/dropout.h).
#pragma once
#include "kernels/cuda/ptx.h"
#include "kernels/dropout.h"

namespace petl::cuda {

// The rounds are a loop: unrolled, in every place where a thread drops out, they would fill the instruction cache.
__device__ __forceinline__ void philox(uint32_t (&counter)[4], uint64_t key) {
  uint32_t first_key = static_cast<uint32_t>(key), second_key = static_cast<uint32_t>(key >> 32);
#pragma unroll 1
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = uint64_t{kPhiloxFirst} * counter[0], second = uint64_t{kPhiloxSecond} * counter[2];
    counter[0] = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ first_key;
    counter[1] = static_cast<uint32_t>(second);
    counter[2] = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ second_key;
    counter[3] = static_cast<uint32_t>(first);
    first_key += kPhiloxFirstStep;
    second_key += kPhiloxSecondStep;
  }
}

// What is kept of eight values, as bits.
struct KeptValues {
  uint32_t bits;
  float scale;

  __device__ __forceinline__ void apply(float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= bits >> i & 1 ? scale : 0.0f;
  }
};

class DropSome {
 public:
  __device__ __forceinline__ explicit DropSome(const Dropout& dropout)
      : key_(static_cast<uint64_t>(dropout.seeds[0])),
        last_word_(static_cast<uint32_t>(dropout.seeds[1])),
        threshold_(dropout.threshold),
        scale_(dropout.scale) {}

  // Of the columns from `column` on, a multiple of eight.
  __device__ __forceinline__ KeptValues kept(int64_t row, int column) const {
    uint32_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4] = {static_cast<uint32_t>(column / 4 + half), static_cast<uint32_t>(row),
                           static_cast<uint32_t>(row >> 32), last_word_};
      philox(words, key_);
#pragma unroll
      for (int i = 0; i < 4; ++i) bits |= words[i] >= threshold_ ? 1u << (4 * half + i) : 0u;
    }
    return {bits, scale_};
  }

 private:
  uint64_t key_;
  uint32_t last_word_, threshold_;
  float scale_;
};

struct KeptAll {
  __device__ __forceinline__ void apply(float (&)[8]) const {}
};

struct DropNothing {
  __device__ __forceinline__ KeptAll kept(int64_t, int) const { return {}; }
};

// Calls function with what drops out: code that drops nothing does not ask for each value whether it should.
template <class Function>
__device__ __forceinline__ void with_dropout(const Dropout& dropout, const Function& function) {
  if (dropout.seeds) {
    function(DropSome(dropout));
  } else {
    function(DropNothing());
  }
}

}  // namespace petl::cuda
