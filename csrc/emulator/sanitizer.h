// The address sanitizer and the thread sanitizer, where the build has them.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ADDRESS_SANITIZER
#endif
#endif

#ifdef EMULATOR_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The build defines EMULATOR_THREAD_SANITIZER: the emulator itself is compiled without the sanitizer.
#ifdef EMULATOR_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* memory, long bytes);
extern "C" void __tsan_write_range(void* memory, long bytes);
#endif

namespace emulator {

// From here on, each access is reported.
inline void forbid([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ADDRESS_SANITIZER
  ASAN_POISON_MEMORY_REGION(memory, bytes);
#endif
}

inline void allow([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ADDRESS_SANITIZER
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
}

// To the thread sanitizer each CUDA thread is a thread. What one does before it publishes on a channel comes before
// what another does after it observes the channel; all else is unordered, whatever order the emulator takes.
inline void publish([[maybe_unused]] void* channel) {
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_release(channel);
#endif
}

inline void observe([[maybe_unused]] void* channel) {
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_acquire(channel);
#endif
}

// What the emulator does in the name of a CUDA thread.
inline void note_read([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_read_range(const_cast<void*>(memory), static_cast<long>(bytes));
#endif
}

inline void note_write([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_write_range(memory, static_cast<long>(bytes));
#endif
}

}  // namespace emulator
