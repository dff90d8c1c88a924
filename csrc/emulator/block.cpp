#include "emulator/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>

#include "emulator/counts.h"
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

constexpr size_t kSharedAlignment = 128;  // what kernels may rely on
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
  allow(begin_ - kMarginBytes, bytes_ + 2 * kMarginBytes);
  ::operator delete(begin_ - kMarginBytes, std::align_val_t{kSharedAlignment});
}

void SharedMemory::renew(size_t bytes) {
  if (!begin_ || bytes != bytes_) {
    if (begin_) release();
    begin_ = static_cast<unsigned char*>(::operator new(bytes + 2 * kMarginBytes, std::align_val_t{kSharedAlignment})) +
             kMarginBytes;
    bytes_ = bytes;
  }
  allow(begin_ - kMarginBytes, bytes_ + 2 * kMarginBytes);
  std::memset(begin_ - kMarginBytes, kGarbage, bytes_ + 2 * kMarginBytes);
  forbid(begin_ - kMarginBytes, kMarginBytes);
  forbid(begin_ + bytes_, kMarginBytes);
}

bool SharedMemory::margins_untouched() {
  allow(begin_ - kMarginBytes, bytes_ + 2 * kMarginBytes);
  const auto garbage = [](unsigned char byte) { return byte == kGarbage; };
  return std::all_of(begin_ - kMarginBytes, begin_, garbage) &&
         std::all_of(begin_ + bytes_, begin_ + bytes_ + kMarginBytes, garbage);
}

Block::Block() : threads_(new Thread[kMaxThreads]) {
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
  counts::begin_block(index, thread_count_, shared_.begin(), shared_.bytes(), stacks_, kMaxThreads * kStackBytes);
  running = this;
  current_ = &next();
  threadIdx = current_->index;
  publish(&launch_);
  home_.switch_to(current_->fiber);
  observe(&returned_);
  running = nullptr;
  counts::end_block();
  if (error_.empty() && !shared_.margins_untouched()) error_ = "writes outside of its shared memory";
  return std::move(error_);
}

void Block::prepare(uint3 index) {
  error_.clear();
  blockIdx = index;
  blockDim = launch_->block;
  gridDim = launch_->grid;
  shared_.renew(launch_->shared_bytes);
  thread_count_ = launch_->block.x * launch_->block.y * launch_->block.z;
  warp_count_ = (thread_count_ + kLanes - 1) / kLanes;
  at_barrier_ = returned_ = 0;
  current_warp_ = first_of(first_bits(warp_count_));
  for (unsigned i = 0; i < warp_count_; ++i) {
    Warp& warp = warps_[i];
    warp.present = warp.runnable = first_bits(std::min(kLanes, thread_count_ - i * kLanes));
    warp.meeting = warp.at_barrier = warp.returned = 0;
  }
  for (unsigned i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    thread.index = position(i, launch_->block);
    thread.warp = i / kLanes;
    thread.lane = i % kLanes;
    thread.copies.forget();
    unsigned char* stack = stacks_ + i * kStackBytes + kPageBytes;
    thread.fiber.start(stack, kStackBytes - kPageBytes - thread.lane * kStackOffset, &Block::enter);
  }
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
  if (++returned_ == thread_count_) leave();
  Fiber& ended = current_->fiber;
  current_ = &next();
  threadIdx = current_->index;
  ended.end_in(current_->fiber);
}

unsigned Block::first_of(uint32_t bits) const {
  return launch_->settings.order == Order::forward ? __builtin_ctz(bits) : 31 - __builtin_clz(bits);
}

Thread& Block::next() {
  if (!warps_[current_warp_].runnable) {
    uint32_t runnable = 0;
    for (unsigned i = 0; i < warp_count_; ++i) runnable |= uint32_t{warps_[i].runnable != 0} << i;
    if (!runnable) {
      error_ = deadlock();
      leave();
    }
    current_warp_ = first_of(runnable);
  }
  return threads_[current_warp_ * kLanes + first_of(warps_[current_warp_].runnable)];
}

void Block::run_next() {
  Thread& old = *current_;
  current_ = &next();
  if (current_ == &old) return;
  threadIdx = current_->index;
  old.fiber.switch_to(current_->fiber);
}

// What lies on the stacks of this block's fibers is not destroyed.
void Block::leave() { current_->fiber.end_in(home_); }

void Block::complain(const std::string& reason, const Place& place) {
  error_ = "thread " + text(current_->index) + ", in " + text(place) + ": " + reason;
}

void Block::meet_warp(const Contribution& own) {
  Warp& warp = warps_[current_warp_];
  const uint32_t bit = uint32_t{1} << current_->lane;
  if (!(own.mask & bit)) {
    complain(std::string(own.operation->name) + ": the mask lacks the calling lane", *own.place);
    leave();
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
  if (at_barrier_ && barrier_->line != place.line) {
    complain("others are at another barrier, in " + text(*barrier_), place);
    leave();
  }
  barrier_ = &place;
  Warp& warp = warps_[current_warp_];
  const uint32_t bit = uint32_t{1} << current_->lane;
  warp.runnable &= ~bit;
  warp.at_barrier |= bit;
  if (warp.at_barrier == warp.present) counts::end_requests(current_warp_);
  void* channel = channels_.current();
  publish(channel);
  if (++at_barrier_ == thread_count_) release_barrier();
  run_next();
  observe(channel);
}

void Block::release_barrier() {
  counts::add("barriers");
  for (unsigned i = 0; i < warp_count_; ++i) {
    warps_[i].runnable = warps_[i].at_barrier;
    warps_[i].at_barrier = 0;
  }
  at_barrier_ = 0;
  channels_.take_next();
  current_warp_ = first_of(first_bits(warp_count_));
}

void Block::copy_async(void* shared, const void* global, bool valid, const Place& place) {
  check_shared(shared, "copy_async", place);
  if (reinterpret_cast<uintptr_t>(global) % 16) {
    complain("copy_async: a source that is not aligned to 16 bytes", place);
    leave();
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
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared_.begin());
  const bool inside = offset <= shared_.bytes() && shared_.bytes() - offset >= 16;
  if (inside && offset % 16 == 0) return;
  complain(std::string(what) + (inside ? ": an address that is not aligned to 16 bytes"
                                       : ": an address outside of the block's shared memory"),
           place);
  leave();
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
  for (unsigned i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    const Warp& warp = warps_[thread.warp];
    if (warp.returned >> thread.lane & 1) {
      add("have returned", thread);
    } else if (warp.at_barrier >> thread.lane & 1) {
      add("wait for their block in " + text(*barrier_), thread);
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
