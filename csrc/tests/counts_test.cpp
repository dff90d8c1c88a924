// The emulator's counters, on small kernels of which one can count by hand what they ask for.
#include <cstdlib>

#include "counts_checks.h"

namespace counts_test {

// Shared memory

__global__ void store_words(int stride) {
  reinterpret_cast<float*>(shared_memory())[static_cast<int>(threadIdx.x) * stride] = 1;
}

__global__ void store_vectors(int stride_bytes) {
  *reinterpret_cast<uint4*>(shared_memory() + static_cast<int>(threadIdx.x) * stride_bytes) = uint4{1, 2, 3, 4};
}

__global__ void store_some_words() {
  if (threadIdx.x % 32 < 11) reinterpret_cast<float*>(shared_memory())[threadIdx.x * 2] = 1;
}

__global__ void store_pairs() { reinterpret_cast<float2*>(shared_memory())[threadIdx.x] = {1, 2}; }

struct Three {
  float a, b, c;
};

__global__ void store_threes() { reinterpret_cast<Three*>(shared_memory())[threadIdx.x] = {1, 2, 3}; }

__global__ void load_one_word(float* out) {
  float* words = reinterpret_cast<float*>(shared_memory());
  const float value = words[5];
  if (value > 0) out[threadIdx.x] = value;
}

// Rows of matrices, so far apart.
__global__ void load_matrices(int stride_bytes) {
  uint32_t parts[4];
  petl::cuda::load_matrices(parts, shared_memory() + static_cast<int>(threadIdx.x) * stride_bytes);
}

void test_shared_memory() {
  const auto stores = [](const char* what, const counts::BlockCounts& block, const Counts& wanted) {
    expect_counts(what, named(block, "shared"), wanted);
  };
  stores("neighboring words", count(32, &store_words, 1), shared("store 4", 1, 1, 1));
  stores("every second word", count(32, &store_words, 2), shared("store 4", 1, 2, 1));
  stores("every 32nd word", count(32, &store_words, 32), shared("store 4", 1, 32, 1));
  stores("one word", count(32, &store_words, 0), shared("store 4", 1, 1, 1));
  stores("of two warps", count(64, &store_words, 2), shared("store 4", 2, 4, 2));
  stores("eleven lanes", count(32, &store_some_words), shared("store 4", 1, 1, 1));
  stores("neighboring vectors", count(32, &store_vectors, 16), shared("store 16", 1, 4, 4));
  stores("vectors 80 bytes apart", count(32, &store_vectors, 80), shared("store 16", 1, 4, 4));
  stores("vectors 32 bytes apart", count(32, &store_vectors, 32), shared("store 16", 1, 8, 4));
  stores("pairs", count(32, &store_pairs), shared("store 8", 1, 2, 2));
  stores("threes are no vectors", count(32, &store_threes), shared("store 4", 3, 3, 3));
  std::vector<float> out(32);
  stores("a word for all", count(32, &load_one_word, out.data()), shared("load 4", 1, 1, 1));
  stores("matrices in neighboring rows", count(32, &load_matrices, 16), shared("ldmatrix 16", 1, 4, 4));
  stores("matrices 64 bytes apart", count(32, &load_matrices, 64), shared("ldmatrix 16", 1, 16, 4));
  stores("matrices 80 bytes apart", count(32, &load_matrices, 80), shared("ldmatrix 16", 1, 4, 4));
}

// Device memory

__global__ void read_words(const float* in, float* out, int stride) {
  out[threadIdx.x] = in[static_cast<int>(threadIdx.x) * stride];
}

__global__ void read_twice(const float* in, float* out) {
  const volatile float* values = in;
  out[threadIdx.x] = values[threadIdx.x] + values[threadIdx.x];
}

__global__ void write_some(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = 1;
}

__global__ void copy(const float* in, bool some) {
  const int lane = static_cast<int>(threadIdx.x);
  petl::cuda::copy_async(shared_memory() + lane * 16, in + lane * 4, !some || lane < 8);
  petl::cuda::commit_copies();
  petl::cuda::wait_for_copies<0>();
}

__global__ void copy_twice(const float* in) {
  for (int i = 0; i < 2; ++i) {
    petl::cuda::copy_async(shared_memory() + threadIdx.x * 16, in + threadIdx.x * 4, true);
    petl::cuda::commit_copies();
    petl::cuda::wait_for_copies<0>();
    __syncwarp();
  }
}

void test_device_memory() {
  Tensors t;
  const auto reads = [](const char* what, const counts::BlockCounts& block, const Counts& wanted) {
    expect_counts(what, named(block, "in"), wanted);
  };
  reads("neighbors", count(32, &read_words, t.in, t.out, 1), read("in", 1, 128, 4, 4));
  reads("every second word", count(32, &read_words, t.in, t.out, 2), read("in", 1, 128, 8, 8));
  reads("every eighth word", count(32, &read_words, t.in, t.out, 8), read("in", 1, 128, 32, 32));
  reads("one word", count(32, &read_words, t.in, t.out, 0), read("in", 1, 4, 1, 1));
  reads("from an odd place", count(32, &read_words, t.in + 1, t.out, 1), read("in", 1, 128, 5, 5));
  reads("again, from the first level", count(32, &read_twice, t.in, t.out), read("in", 2, 256, 8, 4));
  const counts::BlockCounts written = count(32, &write_some, t.out);
  expect_counts("half a warp writes", named(written, "out"), tensor("out write", 1, 64, 2));
  expect_counts("all of a warp writes", named(count(32, &read_words, t.in, t.out, 1), "out"),
                tensor("out write", 1, 128, 4));
  reads("copies", count(32, &copy, t.in, false), read("in", 1, 512, 16, 16));
  reads("copies of zeros read nothing", count(32, &copy, t.in, true), read("in", 1, 128, 4, 4));
  reads("copies pass the first level by", count(32, &copy_twice, t.in), read("in", 2, 1024, 32, 32));
  expect_counts("copies write all the same", named(count(32, &copy, t.in, true), "shared"), shared("copy 16", 1, 4, 4));
}

// Lanes, warps and blocks

// Lanes that part are at one instruction each.
__global__ void write_in_turn(float* out, float* other) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = 1;
  } else {
    other[threadIdx.x] = 1;
  }
}

__global__ void write_rounds(float* out, int rounds) {
  for (int i = 0; i < rounds + static_cast<int>(threadIdx.x) / 16; ++i) out[i * 32 + threadIdx.x] = 1;
}

__global__ void wait_three_times() {
  for (int i = 0; i < 3; ++i) __syncthreads();
}

__global__ void do_nothing(char, const void*, int) {}

void test_lanes_and_blocks() {
  Tensors t;
  expect_counts("lanes that part", named(count(32, &write_in_turn, t.out, t.in), "out"), tensor("out write", 1, 64, 4));
  expect_counts("half a warp goes on", named(count(32, &write_rounds, t.out, 2), "out"),
                tensor("out write", 3, 320, 10));
  expect(count(96, &wait_three_times).counts.at("barriers") == 3, "barriers are a block's");

  launch(dim3(3, 2), 64, 0, &do_nothing, 'a', static_cast<const void*>(t.in), 7);
  const std::vector<counts::LaunchCounts> launches = counts::take_launches();
  expect(launches.size() == 1 && launches[0].blocks.size() == 6 && launches[0].grid.y == 2, "a launch's blocks");
  const std::vector<unsigned char>& bytes = launches[0].parameters;
  const void* pointer = nullptr;
  std::memcpy(&pointer, bytes.data() + 8, sizeof pointer);
  expect(bytes.size() == 20 && bytes[0] == 'a' && pointer == t.in && bytes[16] == 7, "parameters as they lie");
}

// Blocks side by side read other values of `in`, those below each other the same.
__global__ void read_by_column(const float* in, float* out) {
  const unsigned block = blockIdx.x + blockIdx.y * gridDim.x;
  out[block * 32 + threadIdx.x] = in[blockIdx.x * 32 + threadIdx.x] + in[512];
}

void test_sectors_of_neighbors() {
  Tensors t;
  counts::take_launches();
  launch(dim3(3, 2), 32, 0, &read_by_column, static_cast<const float*>(t.in), t.out);
  using Axes = std::array<uint64_t, 8>;
  const std::map<std::string, Axes> wanted{{"in read", Axes{0, 0, 4, 1}}, {"out write", Axes{4}}};
  expect(counts::take_launches().at(0).first_sectors == wanted, "sectors that neighbors touch too");
}

__global__ void read_from_both(const float* in, const float* other, float* out) {
  const float* from = threadIdx.x < 16 ? in : other;
  if (from[threadIdx.x] > 0) out[threadIdx.x] = 1;
}

void test_sectors_of_all() {
  Tensors t;
  counts::take_launches();
  launch(2, 32, 0, &read_from_both, static_cast<const float*>(t.in), static_cast<const float*>(t.out), t.out);
  expect(counts::take_launches().at(0).sectors == Counts{{"in read", 2}, {"out read", 2}},
         "sectors of two tensors that one request touches, in two blocks");
}

void test_samples() {
  emulator::Settings settings = emulator::settings();
  settings.samples_blocks = true;
  emulator::configure(settings);
  counts::take_launches();
  launch(10, 32, 0, &do_nothing, 'a', static_cast<const void*>(nullptr), 7);
  std::vector<unsigned> ran;
  const std::vector<counts::LaunchCounts> launches = counts::take_launches();
  for (const counts::BlockCounts& block : launches.at(0).blocks) ran.push_back(block.index.x);
  std::sort(ran.begin(), ran.end());
  expect(ran == std::vector<unsigned>{0, 1, 5, 9}, "the first block, its neighbor, the middle and the last");
  settings.samples_blocks = false;
  emulator::configure(settings);
}

// Products

__global__ void multiply(float left_value, float right_value) {
  float sums[4] = {};
  const bool first = threadIdx.x == 0;
  const uint32_t left = petl::cuda::pack_bfloat16(first ? left_value : 0, 0);
  const uint32_t right = petl::cuda::pack_bfloat16(first ? right_value : 0, 0);
  petl::cuda::multiply_bfloat16(sums, {left, 0, 0, 0}, {right, 0});
}

// Of left only the first column of depth holds a value, of right only the second row.
__global__ void multiply_past_each_other() {
  float sums[4] = {};
  const bool first = threadIdx.x == 0;
  const uint32_t left = petl::cuda::pack_bfloat16(first ? 1.0f : 0.0f, 0);
  const uint32_t right = petl::cuda::pack_bfloat16(0, first ? 1.0f : 0.0f);
  petl::cuda::multiply_bfloat16(sums, {left, 0, 0, 0}, {right, 0});
}

void test_products() {
  const auto wanted = [](const counts::BlockCounts& block) { return block.counts.at("products wanted"); };
  expect(count(64, &multiply, 1.0f, 1.0f).counts.at("multiply_bfloat16") == 2, "a product for each warp");
  expect(wanted(count(32, &multiply, 1.0f, 1.0f)) == 1, "one term is enough");
  expect(wanted(count(32, &multiply, 1.0f, 0.0f)) == 0, "right is zero");
  expect(wanted(count(32, &multiply, 0.0f, 1.0f)) == 0, "left is zero");
  expect(wanted(count(32, &multiply, NAN, 1.0f)) == 0, "left was never written");
  expect(wanted(count(32, &multiply_past_each_other)) == 0, "no term has both");
}

}  // namespace counts_test

int main() {
  using namespace counts_test;
  emulator::Settings settings = emulator::settings();
  settings.threads = 1;
  emulator::configure(settings);
  test_shared_memory();
  test_device_memory();
  test_lanes_and_blocks();
  test_sectors_of_neighbors();
  test_sectors_of_all();
  test_samples();
  test_products();
  std::printf("%d checked, %d failed\n", emulator_test::checked, emulator_test::failed);
  return emulator_test::failed || !emulator_test::checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
