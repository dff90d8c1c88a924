// The emulator itself: what it computes, what it refuses, and that it finds the faults that kernels are likely to have.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator_checks.h"
#include "emulator_products.h"
#include "faults/product.h"

namespace emulator_test {

using petl::cuda::shared_memory;

// Threads together

__global__ void shuffle_all(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* results = out + lane * 7;
  results[0] = __shfl_sync(0xffffffff, lane * lane, 5);
  results[1] = __shfl_sync(0xffffffff, lane * lane, lane + 3, 8);
  results[2] = __shfl_xor_sync(0xffffffff, lane * lane, 9);
  results[3] = __shfl_down_sync(0xffffffff, lane * lane, 4, 16);
  const unsigned mask = lane < 16 ? 0x0000ffff : 0xffff0000;
  if (lane < 16) {
    results[4] = static_cast<int>(__ballot_sync(mask, lane % 3 == 0));
  } else {
    results[4] = static_cast<int>(__ballot_sync(mask, lane % 5 == 0));
  }
  results[5] = __any_sync(mask, lane == 20);
  results[6] = static_cast<int>(__shfl_xor_sync(0xffffffff, lane * 1e9, 1) / 1e9);
}

void test_shuffles() {
  std::vector<int> out(32 * 7);
  launch(1, 32, 0, &shuffle_all, out.data());
  bool good = true;
  for (int lane = 0; lane < 32; ++lane) {
    const auto square = [](int x) { return x * x; };
    const int segment = lane / 8 * 8, below = lane % 16 + 4 < 16 ? lane + 4 : lane;
    int votes = 0;
    for (int i = lane / 16 * 16; i < lane / 16 * 16 + 16; ++i) {
      if (i % (lane < 16 ? 3 : 5) == 0) votes |= static_cast<int>(1u << i);
    }
    const int wanted[7] = {
        25, square(segment + (lane + 3) % 8), square(lane ^ 9), square(below), votes, lane >= 16, lane ^ 1};
    good &= std::equal(wanted, wanted + 7, out.begin() + lane * 7);
  }
  expect(good, "shuffles and votes");
}

__global__ void reverse_in_block(int* out) {
  const dim3 size = blockDim;
  const unsigned thread = (threadIdx.z * size.y + threadIdx.y) * size.x + threadIdx.x, count = size.x * size.y * size.z;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int* values = reinterpret_cast<int*>(shared_memory());
  for (int round = 0; round < 3; ++round) {
    values[thread] = static_cast<int>(thread * 10) + round;
    __syncthreads();
    out[(block * count + thread) * 3 + round] = values[count - 1 - thread];
    __syncthreads();
  }
}

void test_barriers_and_indices() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  const int blocks = 12, threads = 60;
  std::vector<int> out(blocks * threads * 3), wanted(out.size());
  for (int block_index = 0; block_index < blocks; ++block_index) {
    for (int i = 0; i < threads * 3; ++i) wanted[block_index * threads * 3 + i] = (threads - 1 - i / 3) * 10 + i % 3;
  }
  launch(grid, block, threads * sizeof(int), &reverse_in_block, out.data());
  expect(out == wanted, "barriers and indices");
}

__global__ void watch_copies(const float* from, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  petl::cuda::copy_async(shared, from, true);
  petl::cuda::commit_copies();
  petl::cuda::copy_async(shared + 4, from + 4, true);
  petl::cuda::copy_async(shared + 8, from, false);
  petl::cuda::commit_copies();
  const auto note = [&](int moment) {
    for (int i = 0; i < 12; ++i) out[moment * 12 + i] = shared[i];
  };
  note(0);
  petl::cuda::wait_for_copies<1>();
  note(1);
  petl::cuda::wait_for_copies<0>();
  note(2);
}

void test_copies() {
  const bool lazy = emulator::settings().copies == emulator::Copies::lazy;
  alignas(16) const float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<float> out(36);
  launch(1, 1, 48, &watch_copies, from, out.data());
  bool good = true;
  for (int moment = 0; moment < 3; ++moment) {
    for (int i = 0; i < 12; ++i) {
      const bool landed = !lazy || moment == 2 || (moment == 1 && i < 4);
      const float value = out[moment * 12 + i];
      good &= landed ? value == (i < 8 ? from[i] : 0) : std::isnan(value);
    }
  }
  expect(good, "copies land when they should; until then the memory is garbage");
}

// What the device refuses

__global__ void nothing() {}

void test_refusals() {
  const auto refused = [](cudaError_t error, cudaError_t wanted, const char* what) {
    expect(error == wanted && cudaPeekAtLastError() == wanted && cudaGetLastError() == wanted, what);
    expect(cudaGetLastError() == cudaSuccess, "an error is reported once");
  };
  refused(launch(0, 32, 0, &nothing), cudaErrorInvalidConfiguration, "an empty grid");
  refused(launch(1, 1025, 0, &nothing), cudaErrorInvalidConfiguration, "too many threads");
  refused(launch(1, dim3(32, 33), 0, &nothing), cudaErrorInvalidConfiguration, "too many threads in two dimensions");
  refused(launch(dim3(1, 65536), 32, 0, &nothing), cudaErrorInvalidConfiguration, "a grid too high");
  refused(launch(1, 32, 48 * 1024 + 1, &nothing), cudaErrorInvalidValue, "more shared memory than by default");
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  expect(limit == 227 * 1024, "the device's shared memory");
  const auto raise = [](int bytes) {
    return cudaFuncSetAttribute(&nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  refused(raise(limit + 1), cudaErrorInvalidValue, "a limit above the device's");
  expect(raise(limit) == cudaSuccess, "a raised limit");
  expect(launch(1, 32, static_cast<size_t>(limit), &nothing) == cudaSuccess, "a launch within the raised limit");
  refused(cudaSetDevice(1), cudaErrorInvalidDevice, "a second device");

  const emulator::Settings settings = emulator::settings();
  emulator::Settings small = settings;
  small.shared_memory_limit = 100 * 1024;
  emulator::configure(small);
  refused(launch(1, 32, static_cast<size_t>(limit), &nothing), cudaErrorInvalidValue, "a smaller device");
  emulator::configure(settings);
}

// What is wrong in any order

__global__ void load_misaligned() {
  uint32_t parts[4];
  petl::cuda::load_matrices(parts, shared_memory() + threadIdx.x * 16 + (threadIdx.x == 7 ? 2 : 0));
}

__global__ void load_beyond() {
  uint32_t parts[4];
  petl::cuda::load_matrices_transposed(parts, shared_memory() + (threadIdx.x + 1) * 16);
}

__global__ void copy_to_misaligned(const void* from) { petl::cuda::copy_async(shared_memory() + 8, from, true); }

__global__ void copy_from_misaligned(const char* from) { petl::cuda::copy_async(shared_memory(), from + 4, true); }

__global__ void half_at_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void barrier_in_both_branches() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void multiply_in_part() {
  float sums[4] = {};
  const uint32_t left[4] = {}, right[2] = {};
  if (threadIdx.x != 3) petl::cuda::multiply_bfloat16(sums, left, right);
}

__global__ void shuffle_without_itself() { __shfl_sync(0x1, 1, 0); }

__global__ void different_operations() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __shfl_sync(0xffffffff, 1, 0);
  }
}

void test_complaints() {
  const auto complains = [](const std::function<void()>& run, const std::vector<std::string>& parts) {
    const std::string message = complaint(run);
    bool all = true;
    for (const std::string& part : parts) all &= contains(message, part);
    expect(all, "a message with '" + parts.back() + "', got: " + message);
  };
  const bool forward = emulator::settings().order == emulator::Order::forward;
  alignas(16) static const char memory[32] = {};
  const auto one_block = [](size_t shared_bytes, void (*kernel)()) {
    return [=] { launch(2, 64, shared_bytes, kernel); };
  };
  complains(one_block(1024, &load_misaligned),
            {"emulator_test::load_misaligned()", forward ? "block (0, 0, 0)" : "block (1, 0, 0)", "thread (7, 0, 0)",
             "emulator_test.cpp:", "not aligned to 16 bytes"});
  complains(one_block(1024, &load_beyond), {"thread (63, 0, 0)", "outside of the block's shared memory"});
  complains([] { launch(1, 1, 32, &copy_to_misaligned, memory); }, {"copy_async: an address that is not aligned"});
  complains([] { launch(1, 1, 32, &copy_from_misaligned, memory); }, {"a source that is not aligned"});
  complains(one_block(0, &half_at_barrier), {"deadlock", "32 threads from (32, 0, 0) on have returned",
                                             "32 threads from (0, 0, 0) on wait for their block"});
  complains(one_block(0, &barrier_in_both_branches), {"others are at another barrier"});
  complains(one_block(0, &multiply_in_part), {"deadlock", "wait for their warp at multiply_bfloat16"});
  complains(one_block(0, &shuffle_without_itself), {"the mask lacks the calling lane"});
  complains(one_block(0, &different_operations),
            {"deadlock", "wait for their warp at __syncwarp", "wait for their warp at a shuffle"});
  expect(complaint(one_block(0, &nothing)).empty(), "the emulator goes on after failures");
}

// Planted faults

constexpr int kRows = 45, kColumns = 37, kInner = 104;

// Allocations of their own, so that the address sanitizer sees what is read beyond them.
struct Operands {
  std::vector<uint16_t> left, right;
  std::vector<float> wanted;

  Operands() : wanted(kRows * kColumns) {
    const std::vector<float> left_values = small_integers(kRows * kInner),
                             right_values = small_integers(kColumns * kInner);
    left = packed(left_values, &petl::cuda::pack_bfloat16);
    right = packed(right_values, &petl::cuda::pack_bfloat16);
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        for (int inner = 0; inner < kInner; ++inner) {
          wanted[row * kColumns + column] += left_values[row * kInner + inner] * right_values[column * kInner + inner];
        }
      }
    }
  }
};

template <faults::Fault kFault>
std::vector<float> product(const Operands& operands) {
  std::vector<float> out(kRows * kColumns);
  const dim3 grid((kRows + faults::kTile - 1) / faults::kTile, (kColumns + faults::kTile - 1) / faults::kTile);
  const faults::Product arguments{operands.left.data(), operands.right.data(), out.data(), kRows, kColumns, kInner};
  launch(grid, faults::kThreads, faults::shared_bytes(kFault), &faults::multiply<kFault>, arguments);
  return out;
}

// The modes in which a fault must show: a wrong result or a complaint.
struct Shows {
  bool forward_lazy, forward_eager, reverse_lazy, reverse_eager;

  bool in(const emulator::Settings& settings) const {
    const bool lazy = settings.copies == emulator::Copies::lazy;
    if (settings.order == emulator::Order::forward) return lazy ? forward_lazy : forward_eager;
    return lazy ? reverse_lazy : reverse_eager;
  }
};

template <faults::Fault kFault>
void test_fault(const char* name, const Operands& operands, Shows shows) {
  bool shown = false;
  const std::string message = complaint([&] { shown = product<kFault>(operands) != operands.wanted; });
  expect((shown || !message.empty()) == shows.in(emulator::settings()),
         std::string("planted fault: ") + name + message);
}

// Lane i reads what lane i - 1 has written, without __syncwarp.
__global__ void pass_on(float* out) {
  float* values = reinterpret_cast<float*>(shared_memory());
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 31) % 32];
}

// Right in any order of the threads, and wrong on the device.
__global__ void count_threads(int* out) {
  int* count = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  *count += 1;
  __syncthreads();
  if (threadIdx.x == 0) *out = *count;
}

void test_faults() {
  using faults::Fault;
  const Operands operands;
  const Shows never{false, false, false, false}, always{true, true, true, true};
  const Shows if_lazy{true, false, true, false}, if_eager{false, true, false, true};
  test_fault<Fault::none>("none", operands, never);
  test_fault<Fault::no_wait>("no_wait", operands, if_lazy);
  test_fault<Fault::waits_for_too_few>("waits_for_too_few", operands, if_lazy);
  test_fault<Fault::no_barrier_after_wait>("no_barrier_after_wait", operands, always);
  test_fault<Fault::no_barrier_before_reuse>("no_barrier_before_reuse", operands, if_eager);
  test_fault<Fault::left_parts_swapped>("left_parts_swapped", operands, always);
  test_fault<Fault::right_not_transposed>("right_not_transposed", operands, always);
  test_fault<Fault::sums_of_other_rows>("sums_of_other_rows", operands, always);
  test_fault<Fault::no_zeros_at_edge>("no_zeros_at_edge", operands, always);
  test_fault<Fault::shared_overrun>("shared_overrun", operands, always);

  std::vector<float> out(32);
  launch(1, 32, 128, &pass_on, out.data());
  expect(std::any_of(out.begin(), out.end(), [](float value) { return std::isnan(value); }), "a missing __syncwarp");
}

void test_threads_of_the_system() {
  const emulator::Settings settings = emulator::settings();
  const Operands operands;
  std::string messages[2];
  for (const unsigned threads : {1u, 3u}) {
    emulator::Settings changed = settings;
    changed.threads = threads;
    emulator::configure(changed);
    expect(product<faults::Fault::none>(operands) == operands.wanted, "results on several threads");
    messages[threads == 3] = complaint([] { launch(20, 64, 1024, &load_misaligned); });
  }
  emulator::configure(settings);
  expect(messages[0] == messages[1] && !messages[0].empty(), "the same message on several threads");
}

// Faults that a sanitizer reports

__global__ void write_shared(int offset) { shared_memory()[offset] = 1; }

__global__ void copy_past(const void* from, int offset) {
  petl::cuda::copy_async(shared_memory(), static_cast<const char*>(from) + offset, true);
}

void plant(const std::string& fault) {
  using faults::Fault;
  const std::unique_ptr<double[]> memory(new double[2]());
  std::vector<float> floats(32);
  int count = 0;
  const Operands operands;
  const std::string message = complaint([&] {
    if (fault == "shared_overrun") launch(1, 1, 100, &write_shared, 100);
    if (fault == "shared_underrun") launch(1, 1, 100, &write_shared, -1);
    if (fault == "copy_overrun") launch(1, 1, 100, &copy_past, static_cast<const void*>(memory.get()), 16);
    if (fault == "global_overrun") product<Fault::global_overrun>(operands);
    if (fault == "no_barrier_after_wait") product<Fault::no_barrier_after_wait>(operands);
    if (fault == "no_barrier_before_reuse") product<Fault::no_barrier_before_reuse>(operands);
    if (fault == "no_syncwarp") launch(1, 32, 128, &pass_on, floats.data());
    if (fault == "lost_update") launch(1, 64, 4, &count_threads, &count);
  });
  std::printf("%s\n", message.c_str());
}

void test_what_is_sound() {
  test_multiply<&bfloat16_product>("multiply_bfloat16", &petl::cuda::pack_bfloat16);
  test_multiply<&float16_product>("multiply_float16", &petl::cuda::pack_float16);
  test_load_matrices();
  const Format bfloat16{"bfloat16", 7, 8, &petl::cuda::pack_bfloat16};
  const Format float16{"float16", 10, 5, &petl::cuda::pack_float16};
  test_rounding(bfloat16);
  test_rounding(float16);
  test_unpacking(float16);
  test_shuffles();
  test_barriers_and_indices();
  test_copies();
  test_refusals();
  const Operands operands;
  expect(product<faults::Fault::none>(operands) == operands.wanted, "a product");
}

}  // namespace emulator_test

// With `sound`, only what no sanitizer has anything to say about; with the name of a fault, only that.
int main(int count, char** arguments) {
  using namespace emulator_test;
  const std::string choice = count > 1 ? arguments[1] : "";
  if (choice.empty() || choice == "sound") {
    test_what_is_sound();
  } else {
    plant(choice);
    return EXIT_FAILURE;
  }
  if (choice.empty()) {
    test_complaints();
    test_faults();
    test_threads_of_the_system();
  }
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
