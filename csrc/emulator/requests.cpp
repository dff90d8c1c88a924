#include "emulator/requests.h"

#include <algorithm>

namespace emulator::counts {
namespace {

constexpr unsigned kBanks = 32, kWordBytes = 4, kWarpLanes = 32;

// The words that the lanes of one phase ask for, each once.
std::vector<uintptr_t> words_of(const std::vector<LaneAccess>& lanes, unsigned bytes, unsigned first, unsigned end) {
  std::vector<uintptr_t> words;
  for (const LaneAccess& access : lanes) {
    if (access.lane < first || access.lane >= end) continue;
    for (unsigned byte = 0; byte < bytes; byte += kWordBytes) words.push_back((access.address + byte) / kWordBytes);
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  return words;
}

}  // namespace

Wavefronts wavefronts_of(const std::vector<LaneAccess>& lanes, unsigned bytes) {
  const unsigned phase_lanes = bytes <= 4 ? kWarpLanes : kBanks * kWordBytes / bytes;
  Wavefronts all{0, 0};
  for (unsigned first = 0; first < kWarpLanes; first += phase_lanes) {
    const std::vector<uintptr_t> words = words_of(lanes, bytes, first, first + phase_lanes);
    unsigned of_bank[kBanks] = {};
    for (const uintptr_t word : words) ++of_bank[word % kBanks];
    all.needed += *std::max_element(of_bank, of_bank + kBanks);
    all.least += (words.size() + kBanks - 1) / kBanks;
  }
  return all;
}

std::vector<uintptr_t> sectors_of(const std::vector<LaneAccess>& lanes, unsigned bytes) {
  std::vector<uintptr_t> sectors;
  for (const LaneAccess& access : lanes) {
    const uintptr_t last = (access.address + bytes - 1) / kSectorBytes;
    for (uintptr_t sector = access.address / kSectorBytes; sector <= last; ++sector) sectors.push_back(sector);
  }
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  return sectors;
}

bool FirstLevelCache::read(uintptr_t sector) {
  const auto found = places_.find(sector);
  if (found != places_.end()) {
    latest_first_.splice(latest_first_.begin(), latest_first_, found->second);
    return true;
  }
  if (latest_first_.size() == kSectors) {
    places_.erase(latest_first_.back());
    latest_first_.pop_back();
  }
  latest_first_.push_front(sector);
  places_[sector] = latest_first_.begin();
  return false;
}

void FirstLevelCache::clear() {
  latest_first_.clear();
  places_.clear();
}

std::vector<Access> cut_into_accesses(uintptr_t address, size_t bytes) {
  std::vector<Access> accesses;
  for (const uintptr_t end = address + bytes; address < end;) {
    size_t size = 16;
    while (address % size != 0 || size > end - address) size /= 2;
    accesses.push_back({address, static_cast<unsigned>(size)});
    address += size;
  }
  return accesses;
}

}  // namespace emulator::counts
