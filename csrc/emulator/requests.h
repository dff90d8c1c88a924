// A warp's requests to memory, and what they cost on a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulator::counts {

constexpr unsigned kSectorBytes = 32;

struct LaneAccess {
  unsigned lane;
  uintptr_t address;
};

struct Wavefronts {
  uint64_t needed, least;  // least: if every access of a wavefront could be served from another bank
};

// Shared memory has 32 banks of 4 bytes. A request goes in phases of at most 128 bytes: all lanes at once for 4 bytes
// each, half of them for 8, a quarter for 16. In a phase each bank serves one word per wavefront, to all who ask for
// it.
Wavefronts wavefronts_of(const std::vector<LaneAccess>& lanes, unsigned bytes);

// The sectors of 32 bytes that a request touches, in ascending order.
std::vector<uintptr_t> sectors_of(const std::vector<LaneAccess>& lanes, unsigned bytes);

// The sectors that were read last: what remains of a multiprocessor's first-level cache for a block beside its shared
// memory, at least. Of 256 kB shared memory takes at most 228, so that three blocks have 8 kB each.
class FirstLevelCache {
 public:
  static constexpr size_t kSectors = 256;

  // Whether it holds the sector; from now on it does.
  bool read(uintptr_t sector);
  void clear();

 private:
  std::list<uintptr_t> latest_first_;
  std::unordered_map<uintptr_t, std::list<uintptr_t>::iterator> places_;
};

// An access that a GPU makes by one instruction.
struct Access {
  uintptr_t address;
  unsigned bytes;
};

// Cuts memory that is read or written at once into accesses of 1 to 16 bytes, each aligned to its size.
std::vector<Access> cut_into_accesses(uintptr_t address, size_t bytes);

}  // namespace emulator::counts
