#include "kernels/cpu/work.h"

#ifdef PETL_TIME_WORK
namespace petl::cpu {
Ticks ticks;
}

// The ticks of each Work since the last call.
extern "C" __attribute__((visibility("default"))) void petl_take_ticks(uint64_t* taken) {
  using petl::cpu::ticks;
  ticks.turn_to(petl::cpu::Work::outside);
  for (uint64_t& of_one : ticks.of) {
    *taken++ = of_one;
    of_one = 0;
  }
}
#endif
