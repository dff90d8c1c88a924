// The thread sanitizer sees calls of memcpy even from code that is compiled without it. What the emulator copies for
// the CUDA threads it names by note_read and note_write.
#pragma once
#include <cstddef>
#include <cstring>

namespace emulator {

// Bytes in fours.
inline void copy_unseen(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    std::memcpy(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, 4);
    asm volatile("" ::: "memory");  // or it would become a call
  }
}

}  // namespace emulator
