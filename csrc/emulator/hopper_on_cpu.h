// The functions of kernels/cuda/hopper_ptx.h.
#pragma once
#include <type_traits>

#include "emulator/driver.h"
#include "emulator/hopper.h"
#include "emulator/ptx_on_cpu.h"
#include "kernels/cuda/elements.h"

namespace petl::cuda {

using TileMap = CUtensorMap;
using Barrier = uint64_t;
using emulator::here;
using emulator::Place;

inline emulator::Hopper& hopper() { return emulator::running->hopper(); }

inline unsigned char* tile_memory() { return shared_memory(); }

inline uint32_t tile_address(const void* tile) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(tile) - shared_memory()) + emulator::kSharedBase;
}

template <class T>
uint32_t pack_relu_pair(float low, float high, T element) {
  return pack_pair(low < 0 ? 0 : low, high < 0 ? 0 : high, element);
}

inline void make_barrier(Barrier* barrier, int arrivals, const Place& place = here()) {
  hopper().barriers.init(barrier, static_cast<unsigned>(arrivals), place);
}
inline void show_barriers() {}
inline void arrive(Barrier* barrier, const Place& place = here()) { hopper().barriers.arrive(barrier, 0, place); }
inline void arrive_and_expect(Barrier* barrier, int bytes, const Place& place = here()) {
  hopper().barriers.arrive(barrier, bytes, place);
}
inline void arrive_at(Barrier* barrier, int rank, const Place& place = here()) {
  const emulator::SharedMemory& shared = emulator::running->shared();
  const std::ptrdiff_t offset = shared.begin(static_cast<unsigned>(rank)) - shared_memory();
  hopper().barriers.arrive(reinterpret_cast<unsigned char*>(barrier) + offset, 0, place);
}
inline void wait(Barrier* barrier, int parity, const Place& place = here()) {
  hopper().barriers.wait(barrier, static_cast<unsigned>(parity), place);
}

inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier, const Place& place = here()) {
  hopper().copies.copy(shared, global, static_cast<unsigned>(bytes), barrier, 0, place);
}
inline void copy_bulk_to(int blocks, void* shared, const void* global, int bytes, Barrier* barrier,
                         const Place& place = here()) {
  hopper().copies.copy(shared, global, static_cast<unsigned>(bytes), barrier, static_cast<unsigned>(blocks), place);
}
inline void copy_tile(void* shared, const TileMap& map, int column, int row, Barrier* barrier,
                      const Place& place = here()) {
  hopper().copies.copy_tile(shared, map, column, row, barrier, place);
}
inline void store_tile(const TileMap& map, int column, int row, const void* shared, const Place& place = here()) {
  hopper().copies.store_tile(map, column, row, shared, place);
}
inline void commit_stores() { hopper().copies.commit_stores(); }
template <int kPending>
void wait_for_reads() {
  hopper().copies.wait_for_stores(kPending);
}
inline void show_writes() { hopper().writes.show(); }
inline void prefetch_map(const TileMap&) {}
inline void prefetch_bulk(const void* global, int bytes, const Place& place = here()) {
  hopper().copies.prefetch(global, static_cast<unsigned>(bytes), place);
}

template <int kSums>
void fence_products(float (&)[kSums], const Place& place = here()) {
  emulator::fence_products(place);
}
inline void commit_products(const Place& place = here()) { emulator::commit_products(place); }
template <int kPending, int kSums>
void wait_for_products(float (&)[kSums], const Place& place = here()) {
  emulator::wait_for_products(kPending, place);
}

template <class T>
constexpr emulator::Widen kWiden = std::is_same_v<T, Bfloat16> ? &emulator::Bfloat16::widen : &emulator::Float16::widen;

template <class T, int kSums>
void multiply_tiles(float (&sums)[kSums], uint64_t left_tile, uint64_t right_tile, const Place& place = here()) {
  emulator::multiply_tiles(kWiden<T>, sums, kSums * 2, left_tile, right_tile, place);
}
template <class T>
void multiply_registers(float (&sums)[32], const uint32_t (&left)[4], uint64_t right_tile, int accumulate,
                        const Place& place = here()) {
  emulator::multiply_registers(kWiden<T>, sums, 64, left, right_tile, accumulate != 0, place);
}

inline void store_matrices(void* row, const uint32_t (&parts)[4], const Place& place = here()) {
  emulator::store_matrices(row, parts, place);
}

template <int kCount>
void give_up_registers(const Place& place = here()) {
  hopper().registers.give_up(kCount, place);
}
template <int kCount>
void take_registers(const Place& place = here()) {
  hopper().registers.take(kCount, place);
}

inline int rank_in_cluster() { return static_cast<int>(emulator::running->rank()); }
inline void synchronize_cluster(const Place& place = here()) { hopper().barriers.meet_cluster(place); }

}  // namespace petl::cuda
