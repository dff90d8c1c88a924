// The emulator of what Hopper adds: its answers to hopper_questions.h, and the faults that it must complain about.
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator_checks.h"
#include "hopper_questions.h"

namespace emulator_test {

using namespace petl::cuda;

__global__ void nothing() {}

// Each complaint is provoked once.

constexpr int kBarrierAt = 16384, kFaultBytes = kBarrierAt + 8;

Barrier* barrier_of(int arrivals) {
  Barrier* const barrier = reinterpret_cast<Barrier*>(tile_memory() + kBarrierAt);
  if (threadIdx.x == 0) make_barrier(barrier, arrivals);
  __syncthreads();
  return barrier;
}

uint64_t any_tile() { return describe_tile(tile_memory(), 128); }

__global__ void too_many_arrivals() {
  Barrier* const barrier = barrier_of(2);
  arrive_and_expect(barrier, 16);
  arrive(barrier);
  arrive(barrier);
}

__global__ void no_barrier() { wait(reinterpret_cast<Barrier*>(tile_memory()), 0); }

__global__ void never_ends() { wait(barrier_of(33), 0); }

__global__ void unaligned_tile(TileMap map) { copy_tile(tile_memory() + 128, map, 0, 0, barrier_of(1)); }

__global__ void unaligned_prefetch() { prefetch_bulk(tile_memory() + 8, 16); }

__global__ void outside(TileMap map) { copy_tile(tile_memory() + kBarrierAt, map, 0, 0, barrier_of(1)); }

__global__ void left_alone(TileMap map) {
  Barrier* const barrier = barrier_of(1);
  arrive_and_expect(barrier, 8192);
  copy_tile(tile_memory(), map, 0, 0, barrier);
}

__global__ void unread_store(TileMap map) {
  store_tile(map, 0, 0, tile_memory());
  commit_stores();
}

__global__ void no_fence() {
  float sums[32] = {};
  multiply_tiles<Bfloat16>(sums, any_tile(), any_tile());
}

__global__ void no_wait() {
  float sums[32] = {};
  fence_products(sums);
  multiply_tiles<Bfloat16>(sums, any_tile(), any_tile());
  commit_products();
}

__global__ void touches_sums() {
  float sums[32] = {};
  fence_products(sums);
  multiply_tiles<Bfloat16>(sums, any_tile(), any_tile());
  sums[5] = 1;
  commit_products();
  wait_for_products<0>(sums);
}

__global__ void unshown_writes() {
  const uint32_t parts[4] = {};
  store_matrices(tile_memory() + threadIdx.x % 32 * 128 + threadIdx.x / 32 * 16, parts);
  float sums[32] = {};
  fence_products(sums);
  multiply_tiles<Bfloat16>(sums, any_tile(), any_tile());
}

__global__ void warps_differ() {
  float sums[32] = {};
  fence_products(sums);
  if (threadIdx.x < 64) multiply_tiles<Bfloat16>(sums, any_tile(), any_tile());
  commit_products();
  wait_for_products<0>(sums);
}

__global__ void between_patterns() {
  float sums[32] = {};
  fence_products(sums);
  multiply_tiles<Bfloat16>(sums, describe_tile(tile_memory() + 128, 128), any_tile());
}

__global__ void ended_block() {
  Barrier* const barrier = barrier_of(1);
  synchronize_cluster();
  if (rank_in_cluster() == 1) {
    wait(barrier, 0);  // comes too late for block 0, which has ended
    arrive_at(barrier, 0);
  } else if (threadIdx.x == 0) {
    arrive_at(barrier, 1);
  }
}

__global__ void half_of_a_cluster() {
  if (rank_in_cluster() == 0) synchronize_cluster();
}

// 32 + 2 x 240 is more than three times the 168 that each of 384 threads begins with.
__global__ void too_few_registers() {
  if (threadIdx.x >= 256) {
    give_up_registers<32>();
  } else {
    take_registers<240>();
  }
}

__global__ void odd_registers() { give_up_registers<42>(); }

void test_complaints() {
  std::vector<uint16_t> data(50 * 80);
  TileMap map = {};
  expect(hopper_questions::make_map(map, data.data(), 50, 80), "a map of tiles");
  const bool lazy = emulator::settings().copies == emulator::Copies::lazy;
  const auto complains = [](const char* about, const std::function<void()>& run) {
    const std::string message = complaint(run);
    expect(contains(message, about), std::string("a complaint about '") + about + "', got: " + message);
  };
  const auto threads = [](int count, void (*kernel)()) { return [=] { launch(1, count, kFaultBytes, kernel); }; };
  const auto mapped = [&](void (*kernel)(TileMap)) { return [=] { launch(1, 1, kFaultBytes, kernel, map); }; };
  const auto cluster = [](void (*kernel)()) { return [=] { launch_cluster(2, 2, 32, kFaultBytes, kernel); }; };
  complains("more arrivals", threads(1, &too_many_arrivals));
  complains("no barrier was initialized", threads(1, &no_barrier));
  complains("32 threads from (0, 0, 0) on wait for a barrier's phase", threads(32, &never_ends));
  complains("not aligned", mapped(&unaligned_tile));
  complains("a prefetch", threads(1, &unaligned_prefetch));
  complains("outside", mapped(&outside));
  if (lazy) complains("under way", mapped(&left_alone));
  complains("before its stores have read", mapped(&unread_store));
  complains("without wgmma.fence", threads(128, &no_fence));
  complains("without having waited", threads(128, &no_wait));
  complains("sums changed", threads(128, &touches_sums));
  complains("without fence.proxy.async", threads(128, &unshown_writes));
  complains("different products", threads(128, &warps_differ));
  complains("the swizzle's pattern", threads(128, &between_patterns));
  complains("that has ended", cluster(&ended_block));
  complains("wait for the cluster's barrier", cluster(&half_of_a_cluster));
  complains("wait for registers that others give up", threads(384, &too_few_registers));
  complains("must be a multiple of 8", threads(128, &odd_registers));
}

// Faults that a sanitizer reports

__global__ void bulk_copy_past(const double* from) {
  Barrier* const barrier = barrier_of(1);
  arrive_and_expect(barrier, 32);
  copy_bulk(tile_memory(), from, 32, barrier);
  wait(barrier, 0);
}

__global__ void copy_one_tile(TileMap map) {
  Barrier* const barrier = barrier_of(1);
  arrive_and_expect(barrier, 8192);
  copy_tile(tile_memory(), map, 0, 0, barrier);
  wait(barrier, 0);
}

__global__ void store_one_tile(TileMap map) {
  store_tile(map, 0, 0, tile_memory());
  commit_stores();
  wait_for_reads<0>();
}

enum class Unordered { nothing, read_before_wait, release_before_read, release_before_products };

// One thread fills a stage twice, which a warpgroup reads and multiplies each time.
template <Unordered kFault>
__global__ void reuse_stage(const uint16_t* from, float* out) {
  unsigned char* const memory = tile_memory();
  Barrier *const full = reinterpret_cast<Barrier*>(memory + kBarrierAt), *const empty = full + 1;
  if (threadIdx.x == 0) {
    make_barrier(full, 1);
    make_barrier(empty, 4);
  }
  __syncthreads();
  for (int round = 0; round < 2 && threadIdx.x == 128; ++round) {
    wait(empty, round ^ 1);
    arrive_and_expect(full, 8192);
    copy_bulk(memory, from, 8192, full);
  }
  for (int round = 0; round < 2 && threadIdx.x < 128; ++round) {
    const auto read = [&] { out[threadIdx.x] += static_cast<float>(memory[threadIdx.x]); };
    const auto release = [&] {
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive(empty);
    };
    float sums[32] = {};
    if (kFault == Unordered::read_before_wait) read();
    wait(full, round);
    fence_products(sums);
    multiply_tiles<Bfloat16>(sums, any_tile(), any_tile());
    commit_products();
    if (kFault == Unordered::release_before_products) release();
    wait_for_products<0>(sums);
    if (kFault == Unordered::release_before_read) release();
    if (kFault != Unordered::read_before_wait) read();
    if (kFault == Unordered::nothing || kFault == Unordered::read_before_wait) release();
  }
}

template <Unordered kFault>
void run_stage() {
  const std::vector<uint16_t> from(64 * 64);
  std::vector<float> out(128);
  launch(1, 160, kFaultBytes + 8, &reuse_stage<kFault>, from.data(), out.data());
}

void plant(const std::string& fault) {
  const std::unique_ptr<double[]> memory(new double[2]());
  std::vector<uint16_t> data(63 * 64);  // one row less than is mapped
  TileMap map = {};
  expect(hopper_questions::make_map(map, data.data(), 64, 64), "a map of tiles");
  const std::string message = complaint([&] {
    if (fault == "bulk_copy_overrun") launch(1, 1, kFaultBytes, &bulk_copy_past, memory.get());
    if (fault == "tile_overrun") launch(1, 1, kFaultBytes, &copy_one_tile, map);
    if (fault == "store_overrun") launch(1, 1, kFaultBytes, &store_one_tile, map);
    if (fault == "read_before_wait") run_stage<Unordered::read_before_wait>();
    if (fault == "release_before_read") run_stage<Unordered::release_before_read>();
    if (fault == "release_before_products") run_stage<Unordered::release_before_products>();
  });
  std::printf("%s\n", message.c_str());
}

void test_what_is_sound() {
  const std::string message = complaint([] { run_stage<Unordered::nothing>(); });
  expect(message.empty(), "a stage that is used again: " + message);
  hopper_questions::ask_all([](bool right, const std::string& question) { expect(right, question); });
  expect(launch_cluster(3, 2, 32, 0, &nothing) == cudaErrorInvalidConfiguration,
         "a grid that is not made of whole clusters");
  cudaGetLastError();
}

}  // namespace emulator_test

// With `sound`, only what no sanitizer has anything to say about; with the name of a fault, only that.
int main(int count, char** arguments) {
  using namespace emulator_test;
  const std::string choice = count > 1 ? arguments[1] : "";
  if (!choice.empty() && choice != "sound") {
    plant(choice);
    return EXIT_FAILURE;
  }
  test_what_is_sound();
  if (choice.empty()) test_complaints();
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
