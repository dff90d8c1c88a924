#include "emulator/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>

#include "emulator/counts.h"
#include "emulator/hopper.h"
#include "emulator/text.h"

namespace emulator {
namespace {

// Only what is touched takes memory. Sanitizers make frames larger.
#ifdef EMULATOR_ADDRESS_SANITIZER
constexpr size_t kStackBytes = size_t{512} << 10;
#else
constexpr size_t kStackBytes = size_t{128} << 10;
#endif
constexpr size_t kPageBytes = 4096;

// Stacks of a warp begin at different offsets, or they would fight for the same lines of the cache.
constexpr size_t kStackOffset = 192;

constexpr size_t kSharedAlignment = 1024;  // what the kernels for Hopper rely on
constexpr size_t kMarginBytes = 1024;
constexpr unsigned char kGarbage = 0xff;

constexpr uint32_t first_bits(unsigned count) { return kAllLanes >> (kLanes - count); }

}  // namespace

bool Warp::complete(const Contribution& own) const {
  const uint32_t needed = own.operation->whole_warp ? kAllLanes : own.mask & present;
  if ((meeting & needed) != needed) return false;
  for (uint32_t rest = needed; rest; rest &= rest - 1) {
    if (!contributions[__builtin_ctz(rest)]->matches(own)) return false;
  }
  return true;
}

void PendingCopies::Copy::land() const {
  note_write(to, 16);
  if (from) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}

void PendingCopies::land_all_but(size_t groups) {
  while (group_ends_.size() - landed_groups_ > groups) {
    for (const size_t end = group_ends_[landed_groups_++]; landed_copies_ < end;) copies_[landed_copies_++].land();
  }
  if (landed_groups_ == group_ends_.size() && landed_copies_ == copies_.size()) forget();
}

void PendingCopies::land_all() {
  while (landed_copies_ < copies_.size()) copies_[landed_copies_++].land();
}

void PendingCopies::forget() {
  copies_.clear();
  group_ends_.clear();
  landed_copies_ = landed_groups_ = 0;
}

SharedMemory::~SharedMemory() {
  if (begin_) release();
}

void SharedMemory::release() {
  allow(begin_ - kMarginBytes, total() + kMarginBytes);
  ::operator delete(begin_ - kMarginBytes, std::align_val_t{kSharedAlignment});
}

size_t SharedMemory::stride() const {
  return (bytes_ + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment + kMarginBytes;
}

void SharedMemory::renew(size_t bytes, unsigned windows) {
  if (!begin_ || bytes != bytes_ || windows != windows_) {
    if (begin_) release();
    bytes_ = bytes;
    windows_ = windows;
    begin_ = static_cast<unsigned char*>(::operator new(total() + kMarginBytes, std::align_val_t{kSharedAlignment})) +
             kMarginBytes;
  }
  allow(begin_ - kMarginBytes, total() + kMarginBytes);
  std::memset(begin_ - kMarginBytes, kGarbage, total() + kMarginBytes);
  forbid(begin_ - kMarginBytes, kMarginBytes);
  for (unsigned i = 0; i < windows_; ++i) forbid(begin(i) + bytes_, stride() - bytes_);
}

bool SharedMemory::margins_untouched() {
  allow(begin_ - kMarginBytes, total() + kMarginBytes);
  const auto garbage = [](unsigned char byte) { return byte == kGarbage; };
  bool untouched = std::all_of(begin_ - kMarginBytes, begin_, garbage);
  for (unsigned i = 0; i < windows_; ++i) untouched &= std::all_of(begin(i) + bytes_, begin(i) + stride(), garbage);
  return untouched;
}

Block::Block() : threads_(new Thread[kMaxThreads]), hopper_(new Hopper(*this)) {
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<unsigned char*>(memory);
  // A stack that overflows crashes there.
  for (size_t i = 0; i < kMaxThreads; ++i) mprotect(stacks_ + i * kStackBytes, kPageBytes, PROT_NONE);
}

Block::~Block() {
  allow(stacks_, kMaxThreads * kStackBytes);
  munmap(stacks_, kMaxThreads * kStackBytes);
}

std::string Block::run(const Launch& launch, uint3 index) {
  launch_ = &launch;
  prepare(index);
  const size_t shared_bytes = shared_.begin(launch_->cluster - 1) + shared_.bytes() - shared_.begin();
  counts::begin_block(index, warp_count_ * kLanes, shared_.begin(), shared_bytes, stacks_, kMaxThreads * kStackBytes);
  running = this;
  make_current(next());
  publish(&launch_);
  home_.switch_to(current_->fiber);
  observe(&returned_);
  running = nullptr;
  counts::end_block();
  if (error_.empty()) error_ = hopper_->left_over();
  if (error_.empty() && !shared_.margins_untouched()) error_ = "writes outside of its shared memory";
  return std::move(error_);
}

void Block::prepare(uint3 index) {
  error_.clear();
  blockDim = launch_->block;
  gridDim = launch_->grid;
  const unsigned cluster = launch_->cluster;
  shared_.renew(launch_->shared_bytes, cluster);
  block_threads_ = launch_->block.x * launch_->block.y * launch_->block.z;
  block_warps_ = (block_threads_ + kLanes - 1) / kLanes;
  thread_count_ = block_threads_ * cluster;
  warp_count_ = block_warps_ * cluster;
  returned_ = 0;
  for (unsigned rank = 0; rank < cluster; ++rank) {
    barriers_[rank].arrived = 0;
    left_in_[rank] = block_threads_;
  }
  hopper_->renew();
  current_warp_ = first_of(first_bits(warp_count_));
  for (unsigned i = 0; i < warp_count_; ++i) {
    Warp& warp = warps_[i];
    warp.present = warp.runnable = first_bits(std::min(kLanes, block_threads_ - i % block_warps_ * kLanes));
    warp.meeting = warp.at_barrier = warp.waiting = warp.returned = 0;
  }
  for (unsigned i = 0; i < warp_count_ * kLanes; ++i) {
    Thread& thread = threads_[i];
    thread.rank = i / kLanes / block_warps_;
    thread.index = position(i - thread.rank * block_warps_ * kLanes, launch_->block);
    thread.block = {index.x + thread.rank, index.y, index.z};
    thread.warp = i / kLanes;
    thread.lane = i % kLanes;
    thread.copies.forget();
    unsigned char* stack = stacks_ + i * kStackBytes + kPageBytes;
    thread.fiber.start(stack, kStackBytes - kPageBytes - thread.lane * kStackOffset, &Block::enter);
  }
}

void Block::make_current(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block;
}

void Block::sleep(const char* what, const Place& place) {
  Warp& warp = warps_[current_warp_];
  const uint32_t bit = uint32_t{1} << current_->lane;
  current_->waits_for = what;
  current_->waits_in = &place;
  warp.runnable &= ~bit;
  warp.waiting |= bit;
  run_next();
}

void Block::wake(Thread& thread) {
  Warp& warp = warps_[thread.warp];
  const uint32_t bit = uint32_t{1} << thread.lane;
  warp.waiting &= ~bit;
  warp.runnable |= bit;
}

void Block::enter() {
  Block& block = *running;
  block.current_->fiber.arrived();
  observe(&block.launch_);
  block.launch_->call(block.launch_->kernel, block.launch_->arguments);
  block.finish();
}

void Block::finish() {
  Warp& warp = warps_[current_warp_];
  const uint32_t bit = uint32_t{1} << current_->lane;
  warp.runnable &= ~bit;
  warp.returned |= bit;
  publish(&returned_);
  --left_in_[current_->rank];
  if (++returned_ == thread_count_) leave();
  Fiber& ended = current_->fiber;
  make_current(next());
  ended.end_in(current_->fiber);
}

unsigned Block::first_of(uint32_t bits) const {
  return launch_->settings.order == Order::forward ? __builtin_ctz(bits) : 31 - __builtin_clz(bits);
}

Thread& Block::next() {
  while (!warps_[current_warp_].runnable) {
    uint32_t runnable = 0;
    for (unsigned i = 0; i < warp_count_; ++i) runnable |= uint32_t{warps_[i].runnable != 0} << i;
    if (runnable) {
      current_warp_ = first_of(runnable);
    } else if (!hopper_->copies.land_next()) {
      error_ = deadlock();
      leave();
    }
  }
  return threads_[current_warp_ * kLanes + first_of(warps_[current_warp_].runnable)];
}

void Block::run_next() {
  Thread& old = *current_;
  make_current(next());
  if (current_ == &old) return;
  old.fiber.switch_to(current_->fiber);
}

// What lies on the stacks of this block's fibers is not destroyed.
void Block::leave() { current_->fiber.end_in(home_); }

void Block::begin_error(const Place& place) {
  error_ = "thread " + text(current_->index) + ", in " + text(place) + ": ";
}

void Block::append_to_error(const char* words) { error_ += words; }
void Block::append_to_error(unsigned number) { error_ += std::to_string(number); }
void Block::append_to_error(const Place& place) { error_ += text(place); }

void Block::meet_warp(const Contribution& own) {
  Warp& warp = warps_[current_warp_];
  const uint32_t bit = uint32_t{1} << current_->lane;
  if (!(own.mask & bit)) {
    fail(*own.place, own.operation->name, ": the mask lacks the calling lane");
  }
  warp.contributions[current_->lane] = &own;
  warp.runnable &= ~bit;
  warp.meeting |= bit;
  // The parts of a warp have one channel for all, so that some of their races may be missed.
  void* channel = own.mask == kAllLanes ? warp.channels.current() : &warp.channel_of_parts;
  if (own.operation->orders_memory) publish(channel);
  if (warp.complete(own)) {
    const uint32_t lanes = own.mask & warp.present;
    if (lanes == warp.present) counts::end_requests(current_warp_);
    counts::add(own.operation->name);
    own.operation->resolve(warp, lanes);
    if (own.mask == kAllLanes) warp.channels.take_next();
    warp.meeting &= ~lanes;
    warp.runnable |= lanes;
  }
  run_next();
  if (own.operation->orders_memory) observe(channel);
}

void Block::meet_block(const Place& place) {
  const unsigned rank = current_->rank;
  BlockBarrier& barrier = barriers_[rank];
  if (barrier.arrived && barrier.place->line != place.line) {
    fail(place, "others are at another barrier, in ", *barrier.place);
  }
  barrier.place = &place;
  Warp& warp = warps_[current_warp_];
  const uint32_t bit = uint32_t{1} << current_->lane;
  warp.runnable &= ~bit;
  warp.at_barrier |= bit;
  if (warp.at_barrier == warp.present) counts::end_requests(current_warp_);
  void* channel = barrier.channels.current();
  publish(channel);
  if (++barrier.arrived == block_threads_) release_barrier(rank);
  run_next();
  observe(channel);
}

void Block::release_barrier(unsigned rank) {
  counts::add("barriers");
  for (unsigned i = rank * block_warps_; i < (rank + 1) * block_warps_; ++i) {
    warps_[i].runnable = warps_[i].at_barrier;
    warps_[i].at_barrier = 0;
  }
  barriers_[rank].arrived = 0;
  barriers_[rank].channels.take_next();
  current_warp_ = rank * block_warps_ + first_of(first_bits(block_warps_));
}

void Block::copy_async(void* shared, const void* global, bool valid, const Place& place) {
  check_shared(shared, "copy_async", place);
  if (reinterpret_cast<uintptr_t>(global) % 16) {
    fail(place, "copy_async: a source that is not aligned to 16 bytes");
  }
  const volatile unsigned char* bytes = static_cast<const unsigned char*>(global);
  if (valid) static_cast<void>(bytes[0] + bytes[15]);  // a bad address shows here, not where the copy lands
  if (valid) note_read(global, 16);
  note_write(shared, 16);  // it may land from now on
  counts::note_copy(shared, valid ? global : nullptr, place);
  current_->copies.add(shared, valid ? global : nullptr);
  if (launch_->settings.copies == Copies::eager) current_->copies.land_all();
}

void Block::check_shared(const void* address, const char* what, const Place& place) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared_memory());
  const bool inside = offset <= shared_.bytes() && shared_.bytes() - offset >= 16;
  if (inside && offset % 16 == 0) return;
  fail(place, what,
       inside ? ": an address that is not aligned to 16 bytes" : ": an address outside of the block's shared memory");
}

std::string Block::deadlock() const {
  struct Group {
    unsigned threads;
    uint3 first;
  };
  std::map<std::string, Group> groups;
  const auto add = [&](const std::string& state, const Thread& thread) {
    ++groups.emplace(state, Group{0, thread.index}).first->second.threads;
  };
  for (unsigned i = 0; i < warp_count_ * kLanes; ++i) {
    const Thread& thread = threads_[i];
    const Warp& warp = warps_[thread.warp];
    if (!(warp.present >> thread.lane & 1)) continue;
    if (warp.returned >> thread.lane & 1) {
      add("have returned", thread);
    } else if (warp.at_barrier >> thread.lane & 1) {
      add("wait for their block in " + text(*barriers_[thread.rank].place), thread);
    } else if (warp.waiting >> thread.lane & 1) {
      add(std::string("wait for ") + thread.waits_for + " in " + text(*thread.waits_in), thread);
    } else {
      const Contribution& own = *warp.contributions[thread.lane];
      add(std::string("wait for their warp at ") + own.operation->name + " in " + text(*own.place), thread);
    }
  }
  std::string all = "deadlock";
  for (const auto& [state, group] : groups) {
    all += "; " + std::to_string(group.threads) + " threads from " + text(group.first) + " on " + state;
  }
  return all;
}

}  // namespace emulator
