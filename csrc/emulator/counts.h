// What kernels ask of the machine, counted as a GPU would see it: the accesses of a warp's lanes at one instruction are
// one request. The build defines EMULATOR_COUNTS and compiles the kernels with -O0 -fsanitize=thread, whose calls come
// here in place of its own runtime, so that every access is seen and no kernel knows of it.
//
// Counted is one block at a time, on one thread of the operating system.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator/cuda_types.h"

namespace emulator {

struct Launch;
struct Place;

namespace counts {

// A part of a matrix in device memory.
struct Part {
  unsigned char* first;
  size_t rows, row_bytes, step;  // step: bytes from row to row
};

#ifdef EMULATOR_COUNTS

inline constexpr bool kOn = true;

// A tensor. Accesses to memory that has no name, such as a thread's own, are not counted.
struct Memory {
  std::string name;
  uintptr_t begin, end;
};
void name_memory(const std::string& name, const void* begin, size_t bytes);
void forget_memory();
const std::vector<Memory>& memory();

// Of a block, or of the blocks of a cluster together.
struct BlockCounts {
  uint3 index;
  // By what is counted, for example "mma issued" or "shared store 16 wavefronts".
  std::map<std::string, uint64_t> counts;
};

struct LaunchCounts {
  const void* kernel;
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
  std::vector<unsigned char> parameters;  // as they lie in the device's constant memory
  std::vector<BlockCounts> blocks;        // those that ran
  // The sectors that the first block reads or writes of a tensor, by which of its neighbors touch them too: a bit for
  // each axis of the grid.
  std::map<std::string, std::array<uint64_t, 8>> first_sectors = {};
  // The sectors that any block which ran reads or writes of a tensor, each once.
  std::map<std::string, uint64_t> sectors = {};
};
// Of all launches since it was asked last.
std::vector<LaunchCounts> take_launches();

// For the emulator:
void begin_launch(const Launch& launch);
void end_launch();
void begin_block(uint3 index, unsigned threads, const void* shared, size_t shared_bytes, const void* stacks,
                 size_t stack_bytes);
void end_block();
// The lanes of a warp have met: what they did since they last met are its requests.
void end_requests(unsigned warp);
void add(const char* what, uint64_t count = 1);
// A thread's part in what its warp does.
void note_matrices(const void* row, const Place& place);
void note_stored_matrices(const void* row, const Place& place);
void note_copy(const void* shared, const void* global_or_null, const Place& place);
// What is copied or stored by none of the threads' own accesses, as one request.
void note_part(bool written, const Part& part);

// For the calls that the sanitizer puts into kernels. An instruction and a caller are addresses in their code.
void note_access(bool written, const void* address, size_t bytes, uint64_t instruction);
void enter_function(uint64_t caller);
void leave_function();

#else

inline constexpr bool kOn = false;
inline void begin_launch(const Launch&) {}
inline void end_launch() {}
inline void begin_block(uint3, unsigned, const void*, size_t, const void*, size_t) {}
inline void end_block() {}
inline void end_requests(unsigned) {}
inline void add(const char*, uint64_t = 1) {}
inline void note_matrices(const void*, const Place&) {}
inline void note_stored_matrices(const void*, const Place&) {}
inline void note_copy(const void*, const void*, const Place&) {}
inline void note_part(bool, const Part&) {}

#endif

}  // namespace counts
}  // namespace emulator
