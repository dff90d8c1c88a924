#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "emulator/block.h"
#include "emulator/text.h"

namespace emulator {
namespace {

std::string readable(const char* name) {
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, nullptr), std::free);
  return text ? text.get() : name;
}

// Its type, if it is in an anonymous namespace or the linker does not export its name.
std::string name_of(const Launch& launch) {
  Dl_info info;
  if (dladdr(launch.kernel, &info) && info.dli_sname) return readable(info.dli_sname);
  return "a kernel " + readable(launch.kernel_type);
}

// Blocks with their stacks are kept from launch to launch.
class BlockPool {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(blocks_.back());
    blocks_.pop_back();
    return block;
  }
  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

BlockPool& block_pool() {
  static BlockPool pool;
  return pool;
}

struct Failure {
  size_t turn;  // the block's in the order of the launch
  std::string what;
};

// Every block before one that fails is run, so which failure comes first does not depend on the number of threads.
class Work {
 public:
  explicit Work(const Launch& launch)
      : launch_(launch),
        blocks_(size_t{launch.grid.x} * launch.grid.y * launch.grid.z / launch.cluster),
        first_{blocks_, {}} {}

  void run() {
    unsigned threads = launch_.settings.threads ? launch_.settings.threads : std::thread::hardware_concurrency();
    threads = static_cast<unsigned>(std::min<size_t>(std::max(threads, 1u), blocks_));
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back([this] { take_turns(); });
    take_turns();
    for (std::thread& other : others) other.join();
    if (first_.turn < blocks_) throw std::runtime_error(first_.what);
  }

 private:
  void take_turns() {
    std::unique_ptr<Block> block = block_pool().take();
    while (!failed_) {
      const size_t turn = next_++;
      if (turn >= blocks_) break;
      const size_t number = launch_.settings.order == Order::forward ? turn : blocks_ - 1 - turn;
      const uint3 index = position(number * launch_.cluster, launch_.grid);
      if (launch_.settings.samples_blocks && !is_sample(number, index)) continue;
      const std::string error = block->run(launch_, index);
      if (!error.empty()) report({turn, name_of(launch_) + ", block " + text(index) + ", " + error});
    }
    block_pool().give_back(std::move(block));
  }

  // The first block and its neighbors, the middle one and the last.
  bool is_sample(size_t number, uint3 index) const {
    return index.x + index.y + index.z <= 1 || number == blocks_ / 2 || number + 1 == blocks_;
  }

  void report(Failure failure) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure.turn < first_.turn) first_ = std::move(failure);
    failed_ = true;
  }

  const Launch& launch_;
  const size_t blocks_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  Failure first_;
};

}  // namespace

void run(const Launch& launch) { Work(launch).run(); }

}  // namespace emulator
