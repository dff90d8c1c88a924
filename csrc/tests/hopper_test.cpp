// The emulator of what Hopper adds: products of warpgroups, copies and stores of tiles, clusters, and the faults that
// it must complain about.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>

#include "emulator_checks.h"
#include "kernels/cuda/hopper_ptx.h"

namespace emulator_test {

using namespace petl::cuda;

constexpr int kLeftBytes = 64 * 128, kRightBytes = 256 * 128, kTileBytes = kLeftBytes + kRightBytes;

template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(int blocks, int cluster, int threads, int shared_bytes, void (*kernel)(Parameters...),
                           Arguments... arguments) {
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {{static_cast<unsigned>(cluster), 1, 1}}};
  cudaLaunchConfig_t config;
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Tiles of so many rows, and as many columns as make their rows as wide as a swizzle.
TileMap map_of(std::vector<uint16_t>& data, uint64_t rows, uint64_t columns, unsigned tile_rows,
               unsigned tile_columns) {
  TileMap map;
  const cuuint64_t sizes[] = {columns, rows}, strides[] = {columns * 2};
  const cuuint32_t tile[] = {tile_columns, tile_rows}, steps[] = {1, 1};
  const auto swizzle = tile_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                       : tile_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                            : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result = cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data.data(), sizes, strides,
                                                 tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  expect(result == CUDA_SUCCESS, "a map of tiles");
  return map;
}

// Products: out [64, 2 kSums] = left [64, columns] right [2 kSums, columns]^T, of tiles as wide as their swizzle.

struct Product {
  TileMap left, right;
  int columns;
  bool from_registers;
  float* out;
};

template <class T, int kSums>
__global__ void multiply_group(Product task) {
  unsigned char* const memory = tile_memory();
  Barrier* const full = reinterpret_cast<Barrier*>(memory + kTileBytes);
  const int row_bytes = task.columns * 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) make_barrier(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_and_expect(full, (64 + kSums * 2) * row_bytes);
    copy_tile(memory, task.left, 0, 0, full);
    copy_tile(memory + kLeftBytes, task.right, 0, 0, full);
  }
  wait(full, 0);
  float sums[kSums] = {};
  uint32_t left[4][4];
  for (int step = 0; step < task.columns / 16; ++step) {
    const uint32_t place = (warp * 16 + lane % 16) * row_bytes + step * 32 + lane / 16 * 16;
    load_matrices(left[step], memory + swizzled(place, row_bytes));
  }
  fence_products(sums);
  for (int step = 0; step < task.columns / 16; ++step) {
    const uint64_t right = describe_tile(memory + kLeftBytes, row_bytes) + 2 * step;
    if constexpr (kSums == 32) {
      if (task.from_registers) {
        multiply_registers<T>(sums, left[step], right, step);
        continue;
      }
    }
    multiply_tiles<T>(sums, describe_tile(memory, row_bytes) + 2 * step, right);
  }
  commit_products();
  wait_for_products<0>(sums);
  for (int i = 0; i < kSums; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    task.out[row * kSums * 2 + column] = sums[i];
  }
}

template <class T, int kSums>
void test_product(Pack pack, int columns, bool from_registers) {
  const int width = kSums * 2;
  const std::vector<float> left = small_integers(64 * columns), right = small_integers(width * columns);
  std::vector<uint16_t> left_bits = packed(left, pack), right_bits = packed(right, pack);
  std::vector<float> out(64 * width, -1), wanted(64 * width);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < width; ++column) {
      for (int inner = 0; inner < columns; ++inner) {
        wanted[row * width + column] += left[row * columns + inner] * right[column * columns + inner];
      }
    }
  }
  const Product task{map_of(left_bits, 64, columns, 64, columns), map_of(right_bits, width, columns, width, columns),
                     columns, from_registers, out.data()};
  launch(1, 128, kTileBytes + 8, &multiply_group<T, kSums>, task);
  expect(out == wanted, "a product of " + std::to_string(columns) + " by " + std::to_string(width) + " columns" +
                            (from_registers ? ", left from registers" : ""));
}

void test_products() {
  for (const int columns : {16, 32, 64}) {
    test_product<Bfloat16, 32>(&pack_bfloat16, columns, false);
    test_product<Bfloat16, 32>(&pack_bfloat16, columns, true);
    test_product<Bfloat16, 64>(&pack_bfloat16, columns, false);
    test_product<Float16, 48>(&pack_float16, columns, false);
    test_product<Float16, 32>(&pack_float16, columns, true);
    test_product<Bfloat16, 104>(&pack_bfloat16, columns, false);
    test_product<Float16, 128>(&pack_float16, columns, false);
  }
}

// A tile that hangs over the matrix's edges is filled with zeros, and written back without them.
__global__ void copy_edge(TileMap from, TileMap to, uint16_t* seen) {
  unsigned char* const memory = tile_memory();
  Barrier* const full = reinterpret_cast<Barrier*>(memory + 8192);
  make_barrier(full, 1);
  arrive_and_expect(full, 8192);
  copy_tile(memory, from, 64, 32, full);
  wait(full, 0);
  for (int i = 0; i < 64 * 64; ++i) seen[i] = *reinterpret_cast<uint16_t*>(memory + swizzled(i * 2, 128));
  store_tile(to, 64, 32, memory);
  commit_stores();
  wait_for_reads<0>();
}

void test_edges() {
  constexpr int kRows = 50, kColumns = 80;
  std::vector<uint16_t> from(kRows * kColumns), to(kRows * kColumns, 7), seen(64 * 64, 9);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i + 10);
  launch(1, 1, 8200, &copy_edge, map_of(from, kRows, kColumns, 64, 64), map_of(to, kRows, kColumns, 64, 64),
         seen.data());
  bool reads = true, writes = true;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      const bool is_inside = 32 + row < kRows && 64 + column < kColumns;
      reads &= seen[row * 64 + column] == (is_inside ? from[(32 + row) * kColumns + 64 + column] : 0);
    }
  }
  for (int i = 0; i < kRows * kColumns; ++i) {
    writes &= to[i] == (i / kColumns >= 32 && i % kColumns >= 64 ? from[i] : 7);
  }
  expect(reads, "what is outside of the matrix is read as zeros");
  expect(writes, "what is outside of the matrix is not written");
}

// Each of two blocks copies half of a row to both, and says at both barriers when it has read it.
__global__ void share_row(const int4* row, int4* out) {
  unsigned char* const memory = tile_memory();
  Barrier *const full = reinterpret_cast<Barrier*>(memory + 1024), *const read = full + 1;
  const int rank = rank_in_cluster();
  if (threadIdx.x == 0) {
    make_barrier(full, 1);
    make_barrier(read, 2);
    show_barriers();
  }
  synchronize_cluster();
  if (threadIdx.x == 0) {
    arrive_and_expect(full, 1024);
    copy_bulk_to(3, memory + rank * 512, row + rank * 32, 512, full);
  }
  wait(full, 0);
  for (int i = threadIdx.x; i < 64; i += blockDim.x) out[blockIdx.x * 64 + i] = reinterpret_cast<int4*>(memory)[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_at(read, 0);
    arrive_at(read, 1);
  }
  wait(read, 0);
  synchronize_cluster();
}

void test_clusters() {
  std::vector<int4> row(64), out(4 * 64);
  for (int i = 0; i < 64; ++i) row[i] = {i, i + 1, i + 2, i + 3};
  expect(launch_cluster(4, 2, 32, 1040, &share_row, static_cast<const int4*>(row.data()), out.data()) == cudaSuccess,
         "a launch of clusters");
  bool good = true;
  for (int i = 0; i < 4 * 64; ++i) good &= out[i].x == i % 64 && out[i].w == i % 64 + 3;
  expect(good, "both blocks of a cluster have what each of them copied");
  expect(launch_cluster(3, 2, 32, 1040, &share_row, static_cast<const int4*>(row.data()), out.data()) ==
             cudaErrorInvalidConfiguration,
         "a grid that is not made of whole clusters");
  cudaGetLastError();
}

__global__ void exchange_registers() {
  if (threadIdx.x >= 256) {
    give_up_registers<24>();
  } else {
    take_registers<240>();
  }
}

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
  const TileMap map = map_of(data, 50, 80, 64, 64);
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

void test_what_is_sound() {
  test_products();
  test_edges();
  test_clusters();
  expect(complaint([] { launch(1, 384, 0, &exchange_registers); }).empty(), "registers that change hands");
}

}  // namespace emulator_test

// With `sound`, only what no sanitizer has anything to say about.
int main(int count, char** arguments) {
  using namespace emulator_test;
  test_what_is_sound();
  if (count < 2 || std::string(arguments[1]) != "sound") test_complaints();
  std::printf("%d checked, %d failed\n", checked, failed);
  return failed || !checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
