// Dropout: the value at (row, column) is dropped where its draw of 32 bits is below `threshold`, and else multiplied by
// `scale`. The draw is word column % 4 of what Philox4x32-10 ("Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011)
// makes of the counter (column / 4, the row's lower 32 bits, its upper ones, the lower 32 bits of seeds[1]) by the key
// seeds[0]. So it is the same on every device and for every tiling, and nothing but the seeds is kept for backward.
#pragma once
#include <cstdint>

namespace petl {

struct Dropout {
  const int64_t* seeds;  // [2]; null: nothing is dropped
  uint32_t threshold;    // the probability of being dropped, times 2^32
  float scale;           // 1 / (1 - that probability)
};

// Of a round: words 0 and 2 of the counter are multiplied by these.
constexpr uint32_t kPhiloxFirst = 0xD2511F53, kPhiloxSecond = 0xCD9E8D57;
// What is added to the two words of the key after each round.
constexpr uint32_t kPhiloxFirstStep = 0x9E3779B9, kPhiloxSecondStep = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

}  // namespace petl
