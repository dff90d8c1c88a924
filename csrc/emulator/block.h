// A block of CUDA threads on one thread of the operating system; each CUDA thread is a fiber. A warp runs as far as it
// can, lane by lane, before another one gets its turn, so that a missing barrier shows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/cuda_types.h"
#include "emulator/fiber.h"
#include "emulator/settings.h"

namespace emulator {

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kMaxCluster = 8;
constexpr uint32_t kAllLanes = 0xffffffff;

// A line of a kernel.
struct Place {
  const char* file;
  const char* function;
  int line;
};

// As a default argument: the line of the call. It is passed on by reference: copies would take as long as all the rest.
constexpr Place here(const char* file = __builtin_FILE(), const char* function = __builtin_FUNCTION(),
                     int line = __builtin_LINE()) {
  return {file, function, line};
}

struct Warp;
class Hopper;

// What lanes do together. The last one to arrive calls `resolve`, which does it for all of `lanes`.
struct Operation {
  const char* name;
  bool whole_warp;     // undefined in a warp that lacks lanes
  bool orders_memory;  // what lanes wrote before it, others may read after it
  void (*resolve)(const Warp& warp, uint32_t lanes);
};

// What a lane brings to an operation; derived types add the operands. It lies on the lane's stack, which stands still
// until the operation is done.
struct Contribution {
  const Operation* operation;
  uint32_t mask;
  const Place* place;

  bool matches(const Contribution& other) const {
    return operation == other.operation && mask == other.mask && place->line == other.place->line;
  }
};

// For publish and observe at a barrier. Two in turn: a late thread must not observe what another one publishes at the
// next barrier, and none is two barriers late.
class Channels {
 public:
  void* current() { return &channels_[turn_]; }
  void take_next() { turn_ ^= 1; }

 private:
  char channels_[2];
  int turn_ = 0;
};

// Each of the `present` lanes is either runnable, meeting others of its warp, at the block's barrier, waiting until
// another thread or a copy wakes it, or has returned.
struct Warp {
  uint32_t present, runnable, meeting, at_barrier, waiting, returned;
  const Contribution* contributions[kLanes];  // of the lanes that are meeting
  Channels channels;                          // of the whole warp
  char channel_of_parts;

  // The lanes that `own` needs have all brought the same. Unlike on the device, lanes that have returned are missed.
  bool complete(const Contribution& own) const;
};

// A thread's asynchronous copies of 16 bytes to shared memory.
class PendingCopies {
 public:
  void add(void* to, const void* from_or_null) { copies_.push_back({to, from_or_null}); }
  void commit() { group_ends_.push_back(copies_.size()); }
  void land_all_but(size_t groups);
  void land_all();
  void forget();

 private:
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    void land() const;
  };
  std::vector<Copy> copies_;
  std::vector<size_t> group_ends_;
  size_t landed_copies_ = 0, landed_groups_ = 0;
};

// A block's shared memory, between margins that it must not touch. The address sanitizer sees each access to them; that
// they have been written to shows without it, too.
class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // A window of so many bytes for each block of a cluster. What was there before is lost: it holds NaN in every format,
  // and reads before writes show.
  void renew(size_t bytes, unsigned windows);
  bool margins_untouched();
  unsigned char* begin(unsigned window = 0) const { return begin_ + window * stride(); }
  size_t bytes() const { return bytes_; }
  // Whether these bytes lie in a window.
  bool holds(const void* address, size_t bytes, unsigned window) const {
    const auto* first = static_cast<const unsigned char*>(address);
    return first >= begin(window) && first + bytes <= begin(window) + bytes_;
  }

 private:
  size_t stride() const;  // from window to window; a margin follows each
  size_t total() const { return stride() * windows_; }
  void release();

  unsigned char* begin_ = nullptr;
  size_t bytes_ = 0;
  unsigned windows_ = 0;
};

struct Thread {
  Fiber fiber;
  uint3 index, block;
  unsigned warp, lane;
  unsigned rank;          // of its block in the cluster
  const char* waits_for;  // while its lane is waiting
  const Place* waits_in;
  PendingCopies copies;
};

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;  // blocks, along x
  size_t shared_bytes = 0;
  const void* kernel = nullptr;
  const char* kernel_type = nullptr;  // as typeid names it
  void (*call)(const void* kernel, const void* arguments) = nullptr;
  const void* arguments = nullptr;
  std::vector<unsigned char> parameters;  // the arguments as they lie in the device's constant memory, if counted
  Settings settings;
};

// A block, or the blocks of one cluster.
class Block {
 public:
  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs one block of the launch and returns what went wrong, or nothing.
  std::string run(const Launch& launch, uint3 index);

  // These are for the CUDA thread that runs.
  unsigned lane() const { return current_->lane; }
  Thread& thread() { return *current_; }
  unsigned rank() const { return current_->rank; }
  unsigned warp() const { return current_warp_; }
  unsigned warp_in_block() const { return current_warp_ % block_warps_; }
  unsigned block_threads() const { return block_threads_; }
  unsigned cluster() const { return launch_->cluster; }
  bool has_ended(unsigned rank) const { return left_in_[rank] == 0; }
  bool is_eager() const { return launch_->settings.copies == Copies::eager; }
  bool is_forward() const { return launch_->settings.order == Order::forward; }
  unsigned char* shared_memory() const { return shared_.begin(current_->rank); }
  const SharedMemory& shared() const { return shared_; }
  Hopper& hopper() { return *hopper_; }
  // The thread stands still until another one, or a copy that lands, wakes it.
  void sleep(const char* waits_for, const Place& place);
  void wake(Thread& thread);
  // The parts, in words, numbers and places, say what went wrong. None may own memory: nothing on the fibers' stacks is
  // destroyed.
  template <class... Parts>
  [[noreturn]] void fail(const Place& place, const Parts&... parts) {
    begin_error(place);
    (append_to_error(parts), ...);
    leave();
  }
  void meet_warp(const Contribution& own);
  void meet_block(const Place& place);
  void copy_async(void* shared, const void* global, bool valid, const Place& place);
  void commit_copies() { current_->copies.commit(); }
  void wait_for_copies(size_t pending) { current_->copies.land_all_but(pending); }
  // Fails unless these are 16 aligned bytes in shared memory.
  void check_shared(const void* address, const char* what, const Place& place);

 private:
  static void enter();
  void prepare(uint3 index);
  void make_current(Thread& thread);
  unsigned first_of(uint32_t bits) const;
  Thread& next();
  void run_next();
  void release_barrier(unsigned rank);
  [[noreturn]] void finish();
  [[noreturn]] void leave();
  void begin_error(const Place& place);
  void append_to_error(const char* words);
  void append_to_error(unsigned number);
  void append_to_error(const Place& place);
  std::string deadlock() const;

  const Launch* launch_ = nullptr;
  Fiber home_;
  Thread* current_ = nullptr;
  unsigned block_threads_ = 0, block_warps_ = 0;  // of one block of the cluster
  unsigned thread_count_ = 0, warp_count_ = 0, current_warp_ = 0, returned_ = 0;
  unsigned left_in_[kMaxCluster] = {};  // of each block, the threads that have not returned
  struct BlockBarrier {
    unsigned arrived = 0;
    const Place* place = nullptr;  // where the threads at the barrier are
    Channels channels;
  } barriers_[kMaxCluster];
  Warp warps_[kMaxThreads / kLanes];
  std::unique_ptr<Thread[]> threads_;
  unsigned char* stacks_;
  SharedMemory shared_;
  std::unique_ptr<Hopper> hopper_;
  std::string error_;
};

// The block that this thread of the operating system runs.
inline thread_local Block* running = nullptr;

// Runs all blocks of a launch; throws std::runtime_error if one goes wrong.
void run(const Launch& launch);

}  // namespace emulator
