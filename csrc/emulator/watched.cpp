// What -fsanitize=thread calls in watched code, in place of the sanitizer's own library.
#include <cstdint>

#include "emulator/counts.h"

namespace {
namespace counts = emulator::counts;
}

#define EMULATOR_INSTRUCTION reinterpret_cast<uint64_t>(__builtin_return_address(0))

#define EMULATOR_ACCESSES_OF(bytes)                                   \
  extern "C" void __tsan_read##bytes(void* address) {                 \
    counts::note_access(false, address, bytes, EMULATOR_INSTRUCTION); \
  }                                                                   \
  extern "C" void __tsan_write##bytes(void* address) {                \
    counts::note_access(true, address, bytes, EMULATOR_INSTRUCTION);  \
  }
EMULATOR_ACCESSES_OF(1)
EMULATOR_ACCESSES_OF(2)
EMULATOR_ACCESSES_OF(4)
EMULATOR_ACCESSES_OF(8)
EMULATOR_ACCESSES_OF(16)

extern "C" void __tsan_read_range(void* address, long bytes) {
  counts::note_access(false, address, static_cast<size_t>(bytes), EMULATOR_INSTRUCTION);
}
extern "C" void __tsan_write_range(void* address, long bytes) {
  counts::note_access(true, address, static_cast<size_t>(bytes), EMULATOR_INSTRUCTION);
}
extern "C" void __tsan_func_entry(void* caller) { counts::enter_function(reinterpret_cast<uint64_t>(caller)); }
extern "C" void __tsan_func_exit(void*) { counts::leave_function(); }
extern "C" void __tsan_init() {}

// The host's atomics, which launches use; those of the device would have to be counted. Sequential consistency is in
// every order that may be asked for.
#define EMULATOR_ATOMICS_OF(bits)                                                                                     \
  extern "C" uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* from, int) {                    \
    return __atomic_load_n(from, __ATOMIC_SEQ_CST);                                                                   \
  }                                                                                                                   \
  extern "C" void __tsan_atomic##bits##_store(volatile uint##bits##_t* to, uint##bits##_t value, int) {               \
    __atomic_store_n(to, value, __ATOMIC_SEQ_CST);                                                                    \
  }                                                                                                                   \
  extern "C" uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* at, uint##bits##_t value, int) {  \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                                   \
  extern "C" uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* at, uint##bits##_t value, int) { \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                                   \
  extern "C" uint##bits##_t __tsan_atomic##bits##_fetch_or(volatile uint##bits##_t* at, uint##bits##_t value, int) {  \
    return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                                   \
  extern "C" int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* at, uint##bits##_t* expected, \
                                                               uint##bits##_t value, int, int) {                      \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }
EMULATOR_ATOMICS_OF(8)
EMULATOR_ATOMICS_OF(32)
EMULATOR_ATOMICS_OF(64)
