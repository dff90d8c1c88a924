// What PTX adds for Hopper (sm_90a): barriers that count bytes, copies of tiles by one thread, products of warpgroups,
// clusters. The only other file with PTX in it is ptx.h; the emulator defines functions of the same names here too.
#pragma once
#include <cuda.h>

#include "kernels/cuda/elements.h"

namespace petl::cuda {

// Tiles that warpgroups multiply, and that copies by tiles write, have rows of 128 (or 64, 32) bytes, and are swizzled:
// the number of 16 bytes in the row is XORed with the row's number in 8 (or with the upper two bits or one bit of it),
// so that neither a column nor a row of 16 bytes meets a bank twice. A tile begins at a multiple of 8 rows' bytes.
__host__ __device__ constexpr uint32_t swizzled(uint32_t offset, uint32_t row_bytes) {
  return offset ^ ((offset >> 3) & (row_bytes - 16));
}

}  // namespace petl::cuda

#ifdef __CUDACC__

namespace petl::cuda {

using TileMap = CUtensorMap;

// The block's dynamic shared memory, aligned to 1024 bytes, as 8 rows of 128 bytes must be.
__device__ __forceinline__ unsigned char* tile_memory() {
  extern __shared__ __align__(1024) unsigned char tiles[];
  return tiles;
}

// As descriptors of tiles know it.
__device__ __forceinline__ uint32_t tile_address(const void* tile) { return shared_address(tile); }

// As pack_pair, with zeros for what is negative. A NaN stays one.
__device__ __forceinline__ uint32_t pack_relu_pair(float low, float high, Bfloat16) {
  uint32_t packed;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_relu_pair(float low, float high, Float16) {
  uint32_t packed;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Barriers in shared memory, 8 bytes each. A phase ends when as many arrivals as it was made for, and all bytes that
// were announced, have come. The phases are numbered from 0; their parity is what one waits for.

using Barrier = uint64_t;

__device__ __forceinline__ void make_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Shows new barriers to copies and to the cluster's other blocks; a barrier of the block or the cluster must follow.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the same barrier of another block of the cluster.
__device__ __forceinline__ void arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::
          "r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// An arrival that announces bytes of copies.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended.
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies by one thread, which a barrier of the block counts. `blocks`: bits of the cluster's blocks which receive the
// same at the same place and count it at the same barrier.

__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void copy_bulk_to(int blocks, void* shared, const void* global, int bytes,
                                             Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)),
      "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// A tile of the map's size, from this row and column on; zeros outside of the matrix.
__device__ __forceinline__ void copy_tile(void* shared, const TileMap& map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Asks the second-level cache for what will be read from device memory: so many bytes, a multiple of 16, from a
// multiple of 16 on.
__device__ __forceinline__ void prefetch_bulk(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// The way back; nothing is written outside of the matrix.
__device__ __forceinline__ void store_tile(const TileMap& map, int column, int row, const void* shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(column), "r"(row), "r"(shared_address(shared))
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but kPending groups of this thread's stores have read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Shows what this thread wrote to shared memory to copies and products.
__device__ __forceinline__ void show_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TileMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The inverse of load_matrices.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&parts)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(parts[0]), "r"(parts[1]), "r"(parts[2]), "r"(parts[3])
               : "memory");
}

// How many registers each thread of the warpgroup may have from here on: fewer for who needs few, so that others may
// have more. All warps of the warpgroup call it.
template <int kCount>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// The block's number in its cluster, and a barrier of all the cluster's threads.
__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace petl::cuda

#include "kernels/cuda/hopper_products.h"

#endif

namespace petl::cuda {

// A tile in shared memory for a product: its address, the step from 8 rows to the next, and the kind of swizzle. The
// sum of `tile` and an offset within its first row names the 16 columns from there on.
__device__ __forceinline__ uint64_t describe_tile(const void* tile, uint32_t row_bytes) {
  const uint64_t kind = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return uint64_t{(tile_address(tile) & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{row_bytes * 8 >> 4} << 32 |
         kind << 62;
}

}  // namespace petl::cuda
