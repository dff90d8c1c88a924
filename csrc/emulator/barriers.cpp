#include "emulator/counts.h"
#include "emulator/hopper.h"

namespace emulator {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a barrier can count
constexpr unsigned kRegisters = 65536;         // of a multiprocessor

}  // namespace

void Hopper::renew() {
  barriers.renew();
  writes.renew();
  copies.renew();
  products.renew();
  registers.renew();
  notes_.release();
}

std::string Hopper::left_over() const {
  const std::string of_copies = copies.left_over();
  return of_copies.empty() ? products.left_over() : of_copies;
}

void Barriers::renew() {
  barriers_.clear();
  at_cluster_.clear();
}

void Barriers::init(void* barrier, unsigned arrivals, const Place& place) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) block_.fail(place, "a barrier that is not aligned to 8 bytes");
  barriers_.erase(barrier);
  barriers_.emplace(barrier, Barrier{arrivals, arrivals, 0, 0, std::pmr::list<Waiting>(barriers_.get_allocator())});
}

Barriers::Barrier& Barriers::at(void* address, const Place& place) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) block_.fail(place, "no barrier was initialized there");
  for (unsigned rank = 0; rank < block_.cluster(); ++rank) {
    if (block_.shared().holds(address, 8, rank) && block_.has_ended(rank)) {
      block_.fail(place, "a barrier of a block that has ended");
    }
  }
  return found->second;
}

void Barriers::settle(Barrier& barrier) {
  if (barrier.arrivals_left || barrier.bytes_left) return;
  counts::add("phases");
  barrier.parity ^= 1;
  barrier.arrivals_left = barrier.expected;
  // Those that wait for the phase that has ended; others stay.
  for (auto waiting = barrier.waiting.begin(); waiting != barrier.waiting.end();) {
    if (waiting->parity == barrier.parity) {
      ++waiting;
    } else {
      block_.wake(*waiting->thread);
      waiting = barrier.waiting.erase(waiting);
    }
  }
}

void Barriers::arrive(void* address, int64_t bytes, const Place& place) {
  Barrier& barrier = at(address, place);
  publish(address);
  if (barrier.arrivals_left == 0) block_.fail(place, "more arrivals at a barrier than it expects in a phase");
  counts::add(block_.shared().holds(address, 8, block_.rank()) ? "arrivals" : "arrivals at another block");
  barrier.bytes_left += bytes;
  if (barrier.bytes_left > kMostBytes) block_.fail(place, "a barrier cannot count as many bytes");
  --barrier.arrivals_left;
  settle(barrier);
}

void Barriers::wait(void* address, unsigned parity, const Place& place) {
  Barrier& barrier = at(address, place);
  counts::add("waits");
  if (barrier.parity == parity) {
    barrier.waiting.push_back({&block_.thread(), parity});
    block_.sleep("a barrier's phase", place);
  }
  observe(address);
}

void Barriers::count_bytes(void* address, int64_t bytes) {
  Barrier& barrier = barriers_.at(address);
  barrier.bytes_left -= bytes;
  settle(barrier);
}

void Barriers::meet_cluster(const Place& place) {
  publish(&at_cluster_);
  if (at_cluster_.size() + 1 < block_.block_threads() * block_.cluster()) {
    at_cluster_.push_back(&block_.thread());
    block_.sleep("the cluster's barrier", place);
  } else {
    counts::add("cluster barriers");
    for (Thread* thread : at_cluster_) block_.wake(*thread);
    at_cluster_.clear();
  }
  observe(&at_cluster_);
}

void Registers::renew() {
  waiting_.clear();
  free_.fill(0);
  const unsigned share = kRegisters / block_.block_threads() / 8 * 8;
  per_thread_.assign(kMaxThreads, share < 255 ? share : 255);
}

// The thread's, if such a count can be asked for.
unsigned& Registers::own(unsigned count, const Place& place) {
  if (count % 8 || count < 24 || count > 256) {
    block_.fail(place, "setmaxnreg must be a multiple of 8 from 24 to 256, got ", count);
  }
  return per_thread_[block_.warp() * kLanes + block_.lane()];
}

void Registers::give_up(unsigned count, const Place& place) {
  unsigned& own = this->own(count, place);
  if (count > own) block_.fail(place, "setmaxnreg.dec above the registers that a thread has");
  free_[block_.rank()] += own - count;
  own = count;
  for (Thread* thread : waiting_) block_.wake(*thread);
  waiting_.clear();
}

void Registers::take(unsigned count, const Place& place) {
  unsigned& own = this->own(count, place);
  if (count < own) block_.fail(place, "setmaxnreg.inc below the registers that a thread has");
  while (free_[block_.rank()] < count - own) {
    waiting_.push_back(&block_.thread());
    block_.sleep("registers that others give up", place);
  }
  free_[block_.rank()] -= count - own;
  own = count;
}

}  // namespace emulator
