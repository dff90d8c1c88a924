#include "emulator/counts.h"

#include <algorithm>
#include <tuple>
#include <unordered_set>

#include "emulator/block.h"
#include "emulator/requests.h"

namespace emulator::counts {
namespace {

enum class Kind : uint8_t { load, store, copy, matrices, stored_matrices };
constexpr const char* kKindNames[] = {"load", "store", "copy", "ldmatrix", "stmatrix"};

// A lane's part in a request. `path` tells how the kernel came there, and with the instruction which request it is.
struct Event {
  uint64_t path, instruction;
  uintptr_t address;
  unsigned bytes;
  Kind kind;
};

struct Lane {
  std::vector<Event> events;
  std::vector<uint64_t> paths;  // of the functions that it is in

  uint64_t path() const { return paths.empty() ? 0 : paths.back(); }
};

struct Request {
  unsigned bytes;
  Kind kind;
  std::vector<LaneAccess> lanes;
};

struct SharedTotals {
  uint64_t requests, wavefronts, least;
};

struct TensorTotals {
  uint64_t requests, bytes, sectors, from_second_level;
  std::unordered_set<uintptr_t> distinct;
};

struct Range {
  uintptr_t begin, end;
  bool holds(uintptr_t address) const { return address >= begin && address < end; }
};

Range range_of(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return {address, address + bytes};
}

constexpr int kSharedMemory = -1, kNoMemory = -2;

// The block that runs.
struct Counter {
  std::vector<Lane> lanes;
  Range shared, stacks;
  std::map<std::tuple<Kind, unsigned>, SharedTotals> of_shared;
  std::map<std::tuple<int, bool>, TensorTotals> of_tensors;  // by memory, and whether it is written
  std::map<std::string, uint64_t> of_events;
  FirstLevelCache cache;
};

Counter counter;

// The linker may have taken a function of the standard library from the kernels' objects, where it is watched too.
bool busy = false;
class Unwatched {
 public:
  Unwatched() { busy = true; }
  ~Unwatched() { busy = false; }
};
bool is_watched() { return running && !busy; }

std::vector<Memory> all_memory;
std::vector<LaunchCounts> launches;
// What the launch's first block touched and each of its neighbors: by the axis as a bit, 0 for the first itself.
using Touched = std::map<std::tuple<int, bool>, std::unordered_set<uintptr_t>>;
std::map<unsigned, Touched> first_blocks;
// Of all blocks: by the tensor's sectors in their order.
std::map<std::tuple<int, bool>, std::vector<bool>> touched_by_any;

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15ull + (hash << 6) + (hash >> 2);
  return hash * 0xff51afd7ed558ccdull;
}

int memory_of(uintptr_t address) {
  if (counter.stacks.holds(address)) return kNoMemory;
  if (counter.shared.holds(address)) return kSharedMemory;
  for (size_t i = 0; i < all_memory.size(); ++i) {
    if (address >= all_memory[i].begin && address < all_memory[i].end) return static_cast<int>(i);
  }
  return kNoMemory;
}

Lane& running_lane() { return counter.lanes[running->warp() * kLanes + running->lane()]; }

void note(Kind kind, const void* address, unsigned bytes, uint64_t instruction) {
  if (memory_of(reinterpret_cast<uintptr_t>(address)) == kNoMemory) return;
  Lane& lane = running_lane();
  lane.events.push_back({lane.path(), instruction, reinterpret_cast<uintptr_t>(address), bytes, kind});
}

bool continues(const Event& event, const Event& next) {
  return next.path == event.path && next.kind == event.kind && next.instruction != event.instruction &&
         (event.kind == Kind::load || event.kind == Kind::store) && next.address == event.address + event.bytes;
}

// Whether so much is a vector, or two of 16 bytes, as eight floats are.
bool is_vector(uintptr_t begin, uintptr_t bytes) {
  return (bytes == 4 || bytes == 8 || bytes == 16 || bytes == 32) && begin % std::min<uintptr_t>(bytes, 16) == 0;
}

// What a function reads or writes member by member, as the host's compiler does with a float2 that it has just made, is
// one access on the device. It is taken for a vector by its size and its place alone, for the type is not known here: a
// struct of two floats is, too.
std::vector<Event> merged(const std::vector<Event>& events) {
  std::vector<Event> all;
  for (size_t i = 0; i < events.size();) {
    size_t end = i + 1;
    while (end < events.size() && continues(events[end - 1], events[end])) ++end;
    const uintptr_t begin = events[i].address, bytes = events[end - 1].address + events[end - 1].bytes - begin;
    if (end > i + 1 && is_vector(begin, bytes)) {
      const Event& first = events[i];
      for (const Access& access : cut_into_accesses(begin, bytes)) {
        const uint64_t instruction = first.instruction + (access.address - begin);
        all.push_back({first.path, instruction, access.address, access.bytes, first.kind});
      }
    } else {
      all.insert(all.end(), events.begin() + i, events.begin() + end);
    }
    i = end;
  }
  return all;
}

// Of all lanes of a warp. What several of them did at one instruction, each for the n-th time since they met, is one
// request.
std::vector<Request> requests_of(unsigned warp) {
  struct Seen {
    unsigned lane;
    uint64_t times;
  };
  std::vector<Request> requests;
  std::unordered_map<uint64_t, size_t> places;
  std::unordered_map<uint64_t, Seen> seen;
  const size_t end = std::min<size_t>((warp + 1) * kLanes, counter.lanes.size());
  for (size_t i = warp * kLanes; i < end; ++i) {
    const unsigned lane = i % kLanes;
    for (const Event& event : merged(counter.lanes[i].events)) {
      const uint64_t key = mixed(mixed(event.path, event.instruction), event.bytes * 8 + static_cast<int>(event.kind));
      Seen& times = seen[key];
      if (times.lane != lane) times = {lane, 0};
      const auto [place, is_new] = places.emplace(mixed(key, times.times++), requests.size());
      if (is_new) requests.push_back({event.bytes, event.kind, {}});
      requests[place->second].lanes.push_back({lane, event.address});
    }
    counter.lanes[i].events.clear();
  }
  return requests;
}

// Bytes that several lanes share count once.
uint64_t bytes_of(const Request& request) {
  std::vector<uintptr_t> addresses;
  for (const LaneAccess& access : request.lanes) addresses.push_back(access.address);
  std::sort(addresses.begin(), addresses.end());
  uint64_t bytes = 0;
  uintptr_t end = 0;
  for (const uintptr_t address : addresses) {
    bytes += address + request.bytes - std::min(std::max(address, end), address + request.bytes);
    end = address + request.bytes;
  }
  return bytes;
}

void add_to_shared(const Request& request) {
  const Wavefronts wavefronts = wavefronts_of(request.lanes, request.bytes);
  SharedTotals& totals = counter.of_shared[{request.kind, request.bytes}];
  ++totals.requests;
  totals.wavefronts += wavefronts.needed;
  totals.least += wavefronts.least;
}

void add_to_tensor(const Request& request, int memory) {
  const bool written = request.kind == Kind::store;
  TensorTotals& totals = counter.of_tensors[{memory, written}];
  ++totals.requests;
  totals.bytes += bytes_of(request);
  for (const uintptr_t sector : sectors_of(request.lanes, request.bytes)) {
    ++totals.sectors;
    totals.distinct.insert(sector);
    // Asynchronous copies pass the first level by.
    if (!written && (request.kind == Kind::copy || !counter.cache.read(sector))) ++totals.from_second_level;
  }
}

std::string name_of(const std::tuple<int, bool>& place) {
  const auto [memory, written] = place;
  return all_memory[memory].name + (written ? " write" : " read");
}

std::map<std::string, uint64_t> named_totals() {
  std::map<std::string, uint64_t> all = counter.of_events;
  for (const auto& [place, totals] : counter.of_shared) {
    const auto [kind, bytes] = place;
    const std::string name = std::string("shared ") + kKindNames[static_cast<int>(kind)] + " " + std::to_string(bytes);
    all[name + " requests"] = totals.requests;
    all[name + " wavefronts"] = totals.wavefronts;
    all[name + " least"] = totals.least;
  }
  for (const auto& [place, totals] : counter.of_tensors) {
    const std::string name = name_of(place);
    // Several tensors may have one name.
    all[name + " requests"] += totals.requests;
    all[name + " bytes"] += totals.bytes;
    all[name + " sectors"] += totals.sectors;
    if (!std::get<bool>(place)) all[name + " L2"] += totals.from_second_level;
  }
  return all;
}

uintptr_t first_sector_of(const Memory& memory) { return memory.begin / kSectorBytes; }
uintptr_t end_sector_of(const Memory& memory) { return (memory.end - 1) / kSectorBytes + 1; }

// The lanes of a request may lie in several tensors: it is named after the first lane's.
void mark_touched(const std::tuple<int, bool>& place, const TensorTotals& totals) {
  for (const uintptr_t sector : totals.distinct) {
    int memory = std::get<int>(place);
    const bool is_inside = sector >= first_sector_of(all_memory[memory]) && sector < end_sector_of(all_memory[memory]);
    if (!is_inside) memory = memory_of(sector * kSectorBytes);
    if (memory < 0) continue;
    std::vector<bool>& touched = touched_by_any[{memory, std::get<bool>(place)}];
    touched.resize(end_sector_of(all_memory[memory]) - first_sector_of(all_memory[memory]));
    touched[sector - first_sector_of(all_memory[memory])] = true;
  }
}

}  // namespace

void name_memory(const std::string& name, const void* begin, size_t bytes) {
  const Range range = range_of(begin, bytes);
  all_memory.push_back({name, range.begin, range.end});
}

void forget_memory() { all_memory.clear(); }

const std::vector<Memory>& memory() { return all_memory; }

std::vector<LaunchCounts> take_launches() { return std::exchange(launches, {}); }

void begin_launch(const Launch& launch) {
  launches.push_back(
      {launch.kernel, launch.grid, launch.block, launch.cluster, launch.shared_bytes, launch.parameters, {}});
}

void end_launch() {
  const Unwatched unwatched;
  for (const auto& [place, sectors] : first_blocks[0]) {
    for (const uintptr_t sector : sectors) {
      unsigned axes = 0;
      for (auto& [axis, touched] : first_blocks) axes |= touched[place].count(sector) ? axis : 0;
      ++launches.back().first_sectors[name_of(place)][axes];
    }
  }
  first_blocks.clear();
  for (const auto& [place, touched] : touched_by_any) {
    launches.back().sectors[name_of(place)] += std::count(touched.begin(), touched.end(), true);
  }
  touched_by_any.clear();
}

void begin_block(uint3 index, unsigned threads, const void* shared, size_t shared_bytes, const void* stacks,
                 size_t stack_bytes) {
  const Unwatched unwatched;
  counter = {};
  counter.lanes.resize(threads);
  counter.shared = range_of(shared, shared_bytes);
  counter.stacks = range_of(stacks, stack_bytes);
  launches.back().blocks.push_back({index, {}});
}

void end_block() {
  for (unsigned warp = 0; warp * kLanes < counter.lanes.size(); ++warp) end_requests(warp);
  const Unwatched unwatched;
  BlockCounts& block = launches.back().blocks.back();
  block.counts = named_totals();
  for (const auto& [place, totals] : counter.of_tensors) mark_touched(place, totals);
  if (block.index.x + block.index.y + block.index.z > 1) return;
  for (const auto& [place, totals] : counter.of_tensors) {
    first_blocks[block.index.x + 2 * block.index.y + 4 * block.index.z][place] = totals.distinct;
  }
}

void end_requests(unsigned warp) {
  const Unwatched unwatched;
  for (const Request& request : requests_of(warp)) {
    const int memory = memory_of(request.lanes.front().address);
    if (memory == kSharedMemory) {
      add_to_shared(request);
    } else {
      add_to_tensor(request, memory);
    }
  }
}

void add(const char* what, uint64_t count) {
  const Unwatched unwatched;
  counter.of_events[what] += count;
}

void note_matrices(const void* row, const Place& place) {
  const Unwatched unwatched;
  note(Kind::matrices, row, 16, place.line);
}

void note_stored_matrices(const void* row, const Place& place) {
  const Unwatched unwatched;
  note(Kind::stored_matrices, row, 16, place.line);
}

void note_part(bool written, const Part& part) {
  const Unwatched unwatched;
  const auto first = reinterpret_cast<uintptr_t>(part.first);
  const int memory = part.rows ? memory_of(first) : kNoMemory;
  if (memory == kNoMemory) return;
  TensorTotals& totals = counter.of_tensors[{memory, written}];
  ++totals.requests;
  totals.bytes += part.rows * part.row_bytes;
  for (size_t row = 0; row < part.rows; ++row) {
    const uintptr_t begin = first + row * part.step, last = (begin + part.row_bytes - 1) / kSectorBytes;
    for (uintptr_t sector = begin / kSectorBytes; sector <= last; ++sector) {
      ++totals.sectors;
      totals.distinct.insert(sector);
      if (!written) ++totals.from_second_level;
    }
  }
}

void note_copy(const void* shared, const void* global_or_null, const Place& place) {
  const Unwatched unwatched;
  if (global_or_null) note(Kind::copy, global_or_null, 16, place.line);
  note(Kind::copy, shared, 16, place.line + (uint64_t{1} << 32));
}

void note_access(bool written, const void* address, size_t bytes, uint64_t instruction) {
  if (!is_watched()) return;
  const Unwatched unwatched;
  // Most accesses are to a thread's own memory.
  if (memory_of(reinterpret_cast<uintptr_t>(address)) == kNoMemory) return;
  for (const Access& access : cut_into_accesses(reinterpret_cast<uintptr_t>(address), bytes)) {
    const uint64_t offset = access.address - reinterpret_cast<uintptr_t>(address);
    note(written ? Kind::store : Kind::load, reinterpret_cast<const void*>(access.address), access.bytes,
         instruction + offset);
  }
}

void enter_function(uint64_t caller) {
  if (!is_watched()) return;
  const Unwatched unwatched;
  Lane& lane = running_lane();
  lane.paths.push_back(mixed(lane.path(), caller));
}

void leave_function() {
  if (!is_watched()) return;
  const Unwatched unwatched;
  Lane& lane = running_lane();
  if (!lane.paths.empty()) lane.paths.pop_back();
}

}  // namespace emulator::counts
