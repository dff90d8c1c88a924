// The emulator's counters of what Hopper adds, on small kernels of which one can count by hand what they ask for.
#include <cstdlib>

#include "counts_checks.h"
#include "kernels/cuda/hopper_ptx.h"
#include "kernels/cuda/tile_maps.h"

namespace counts_test {

using emulator_test::launch_cluster;
using petl::cuda::TileMap;

petl::cuda::Barrier* barrier_of(int arrivals) {
  auto* const barrier = reinterpret_cast<petl::cuda::Barrier*>(petl::cuda::tile_memory() + 16384);
  if (threadIdx.x == 0) petl::cuda::make_barrier(barrier, arrivals);
  __syncthreads();
  return barrier;
}

// A tile of 64 x 64, of which half the rows are in the matrix.
__global__ void copy_half_a_tile(TileMap map) {
  petl::cuda::Barrier* const barrier = barrier_of(1);
  petl::cuda::arrive_and_expect(barrier, 8192);
  petl::cuda::copy_tile(petl::cuda::tile_memory(), map, 0, 0, barrier);
  petl::cuda::wait(barrier, 0);
}

__global__ void store_an_eighth(TileMap map) {
  petl::cuda::store_tile(map, 0, 24, petl::cuda::tile_memory());
  petl::cuda::commit_stores();
  petl::cuda::wait_for_reads<0>();
}

// Each of two blocks copies 256 bytes to both.
__global__ void copy_to_both(const unsigned char* in) {
  petl::cuda::Barrier* const barrier = barrier_of(3);
  petl::cuda::synchronize_cluster();
  const int rank = petl::cuda::rank_in_cluster();
  petl::cuda::copy_bulk_to(3, petl::cuda::tile_memory() + rank * 256, in + rank * 256, 256, barrier);
  petl::cuda::arrive_and_expect(barrier, 512);
  for (int block = 0; block < 2; ++block) petl::cuda::arrive_at(barrier, block);
  petl::cuda::wait(barrier, 0);
  petl::cuda::synchronize_cluster();
}

// Of both tiles, which are one, only the first element is other than zero or NaN.
__global__ void multiply_by_group(bool from_registers) {
  if (threadIdx.x == 0) *reinterpret_cast<uint16_t*>(petl::cuda::tile_memory()) = 0x3f80;
  __syncthreads();
  float sums[32] = {};
  const uint64_t tile = petl::cuda::describe_tile(petl::cuda::tile_memory(), 128);
  petl::cuda::fence_products(sums);
  if (from_registers) {
    petl::cuda::multiply_registers<petl::cuda::Bfloat16>(sums, {0x3f80, 0, 0, 0}, tile, 1);
  } else {
    petl::cuda::multiply_tiles<petl::cuda::Bfloat16>(sums, tile, tile);
  }
  petl::cuda::commit_products();
  petl::cuda::wait_for_products<0>(sums);
}

__global__ void store_matrices(int stride_bytes) {
  petl::cuda::store_matrices(petl::cuda::tile_memory() + static_cast<int>(threadIdx.x) * stride_bytes, {});
}

TileMap map_of(float* half_of_rows) {
  TileMap map = {};
  const bool is_made = petl::cuda::encode_tiles(petl::cuda::tile_encoder(), map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                                half_of_rows, 32, 64, 64, 64);
  expect(is_made, "a map of tiles");
  return map;
}

void test_copies_by_one_thread() {
  Tensors t;
  const counts::BlockCounts copied = count(1, &copy_half_a_tile, map_of(t.in));
  expect_counts("half a tile", named(copied, "in"), read("in", 1, 4096, 128, 128));
  expect_counts("arrives as a whole one", named(copied, "shared"), {{"shared bulk copy bytes", 8192}});
  expect(copied.counts.at("arrivals") == 1 && copied.counts.at("waits") == 1 && copied.counts.at("phases") == 1,
         "arrivals, waits and phases");
  const counts::BlockCounts stored = count(1, &store_an_eighth, map_of(t.out));
  expect_counts("an eighth of a tile", named(stored, "out"), tensor("out write", 1, 1024, 32));
  expect_counts("is read as a whole one", named(stored, "shared"), {{"shared bulk store bytes", 8192}});
}

void test_clusters() {
  Tensors t;
  counts::take_launches();
  launch_cluster(4, 2, 1, 32768, &copy_to_both, reinterpret_cast<const unsigned char*>(t.in));
  const counts::LaunchCounts both = counts::take_launches().at(0);
  expect(both.cluster == 2 && both.blocks.size() == 2, "the blocks of a cluster count together");
  const counts::BlockCounts& first = both.blocks.at(0);
  expect_counts("copies to both read once", named(first, "in"), read("in", 2, 512, 16, 16));
  expect_counts("and come to both", named(first, "shared"), {{"shared bulk copy bytes", 1024}});
  const Counts arrivals{{"arrivals", 4}, {"arrivals at another block", 2}};
  expect_counts("of six arrivals", named(first, "arrivals"), arrivals);
  expect(first.counts.at("cluster barriers") == 2 && first.counts.at("phases") == 2, "barriers of a cluster");
  expect(both.sectors == Counts{{"in read", 16}}, "what both clusters read counts once");
}

void test_group_products() {
  const auto products = [](const char* what, bool from_registers, uint64_t wanted, uint64_t bytes) {
    const counts::BlockCounts block = count(128, &multiply_by_group, from_registers);
    expect_counts(what, named(block, "group"), {{"group products", 32}, {"group products wanted", wanted}});
    expect(block.counts.at("shared product bytes") == bytes, std::string(what) + ": bytes");
  };
  // 64 rows and 64 columns of 16 elements; one product of one warp has a term.
  products("from shared memory", false, 1, 4096);
  // All four warps have one.
  products("from registers", true, 4, 2048);
  expect_counts("stored matrices in neighboring rows", named(count(32, &store_matrices, 16), "shared"),
                shared("stmatrix 16", 1, 4, 4));
  expect_counts("stored matrices 64 bytes apart", named(count(32, &store_matrices, 64), "shared"),
                shared("stmatrix 16", 1, 16, 4));
}

}  // namespace counts_test

int main() {
  using namespace counts_test;
  emulator::Settings settings = emulator::settings();
  settings.threads = 1;
  emulator::configure(settings);
  test_copies_by_one_thread();
  test_clusters();
  test_group_products();
  std::printf("%d checked, %d failed\n", emulator_test::checked, emulator_test::failed);
  return emulator_test::failed || !emulator_test::checked ? EXIT_FAILURE : EXIT_SUCCESS;
}
