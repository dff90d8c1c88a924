// What Hopper (compute capability 9.0) does beside the threads: barriers in shared memory that count arrivals and
// bytes, copies and stores of whole tiles, products of warpgroups, and registers that change hands. One object serves a
// block, or all blocks of a cluster.
//
// Eager: copies land and products are formed at once. Lazy: a copy lands only when no thread could go on without it,
// the oldest first (in reverse order: the newest); a product reads shared memory and writes its sums when it is waited
// for, and until then the sums hold NaN. A kernel must be right either way.
//
// Nothing is freed while CUDA threads run: to the thread sanitizer, memory that one of them frees and another gets
// would be a race. Nor is a container used here in code that kernels' files compile, where the sanitizer sees it.
#pragma once
#include <array>
#include <list>
#include <map>
#include <memory>
#include <memory_resource>
#include <string>
#include <utility>
#include <vector>

#include "emulator/block.h"

namespace emulator {

// A matrix of 16-bit elements in device memory, as copies by tiles see it. The device's is opaque and has 128 bytes.
struct alignas(64) TensorMap {
  unsigned char* data;
  uint64_t columns, rows, row_bytes;
  uint32_t tile_columns, tile_rows;
  uint32_t swizzled_bytes;  // a row of the tile: 128, 64 or 32

  size_t tile_bytes() const { return size_t{tile_rows} * swizzled_bytes; }
};

// Of an address, where tiles with rows of 128, 64 or 32 bytes keep what it names: the row's number within 8 rows is
// added (without carry) to that of 16 bytes in the row.
inline uintptr_t swizzled(uintptr_t address, uintptr_t row_bytes) {
  return address ^ ((address >> 3) & (row_bytes - 16));
}

// Where shared memory begins in the addresses that descriptors of tiles hold: not at zero, as on the device.
constexpr uint32_t kSharedBase = 1024;

// Memory for what is noted of one run.
using Notes = std::pmr::memory_resource;

// Barriers complete a phase when all arrivals and all bytes that were announced have come.
class Barriers {
 public:
  Barriers(Block& block, Notes* notes) : block_(block), barriers_(notes) { at_cluster_.reserve(kMaxThreads); }
  void renew();

  void init(void* barrier, unsigned arrivals, const Place& place);
  void arrive(void* barrier, int64_t bytes, const Place& place);
  void wait(void* barrier, unsigned parity, const Place& place);
  // All threads of the cluster.
  void meet_cluster(const Place& place);

  // For copies: fails unless there is such a barrier; a copy has landed.
  void require(void* barrier, const Place& place) { at(barrier, place); }
  void count_bytes(void* barrier, int64_t bytes);

 private:
  struct Waiting {
    Thread* thread;
    unsigned parity;
  };
  struct Barrier {
    unsigned expected, arrivals_left;
    int64_t bytes_left;
    unsigned parity;  // of the phase that has not ended
    std::pmr::list<Waiting> waiting;
  };

  Barrier& at(void* address, const Place& place);
  void settle(Barrier& barrier);

  Block& block_;
  std::pmr::map<void*, Barrier> barriers_;
  std::vector<Thread*> at_cluster_;
};

// What ordinary stores wrote and fence.proxy.async has not yet shown to copies and products. Only store_matrices is
// seen.
class OrdinaryWrites {
 public:
  OrdinaryWrites(Block& block, Notes* notes) : block_(block), unshown_(notes) {}
  void renew() { unshown_.clear(); }

  void note(const void* address, size_t bytes);
  void show();  // the running thread's
  void require_shown(const unsigned char* begin, size_t bytes, const char* what, const Place& place) const;

 private:
  Block& block_;
  std::pmr::map<uintptr_t, Thread*> unshown_;  // by 16 bytes
};

class BulkCopies {
 public:
  BulkCopies(Block& block, Notes* notes, Barriers& barriers, OrdinaryWrites& writes)
      : block_(block), barriers_(barriers), writes_(writes), copies_(notes), stores_(notes) {}
  void renew();

  // `blocks`: bits of those of the cluster that receive it, at the same place of their shared memory; 0: this one.
  void copy(void* to, const void* from, unsigned bytes, void* barrier, unsigned blocks, const Place& place);
  void copy_tile(void* to, const TensorMap& from, int column, int row, void* barrier, const Place& place);
  // Changes nothing: it only may not ask for what is not there.
  void prefetch(const void* from, unsigned bytes, const Place& place);

  void store_tile(const TensorMap& to, int column, int row, const void* from, const Place& place);
  void commit_stores();
  void wait_for_stores(size_t pending);

  // Lets one copy land; false if none is under way. For when no thread can go on.
  bool land_next();
  std::string left_over() const;

 private:
  struct Copy {
    unsigned char *to, *barrier;
    const unsigned char* from;  // null: a tile
    TensorMap map;
    int column, row;
    unsigned bytes, blocks, rank;
  };
  struct Store {
    TensorMap map;
    int column, row;
    const unsigned char* from;
    size_t group;
  };
  struct Stores {
    std::array<Store, 8> pending;
    size_t count = 0, groups = 0;
  };

  void begin(Copy& copy, const Place& place);
  template <class Visit>
  void for_each_target(const Copy& copy, Visit visit) const;
  void finish(const Store& store) const;

  Block& block_;
  Barriers& barriers_;
  OrdinaryWrites& writes_;
  std::pmr::list<Copy> copies_;
  std::pmr::map<Thread*, Stores> stores_;
};

// Products, each warp's 16 rows of the group's 64: sums [64, columns] += left [64, 16] right [columns, 16]^T.
class GroupProducts {
 public:
  struct Operands {
    float* sums[kLanes];
    uint32_t left[kLanes][4];
    bool left_in_registers, accumulates;
    uint64_t left_tile, right_tile;
    unsigned columns, warp_in_group;
    float (*widen)(uint32_t);
    unsigned char* shared;  // of the block
    const Place* place;     // while the product is issued
  };

  GroupProducts(Block& block, OrdinaryWrites& writes)
      : block_(block), writes_(writes), warps_(new PerWarp[kMaxThreads / kLanes]) {}
  void renew();

  void fence() { warps_[block_.warp()].fenced = true; }
  void multiply(const Operands& operands);
  void commit() { ++warps_[block_.warp()].groups; }
  void wait(size_t pending, const Place& place);
  // What was read until now: for the thread sanitizer, in the name of the warp's first lane.
  void note_reads();
  std::string left_over() const;

 private:
  static constexpr size_t kMostPending = 64, kMostSums = 128;
  struct Sums {
    float* of = nullptr;  // lane 0's
    unsigned users = 0;   // products under way
    std::array<float, kLanes * kMostSums> values;
  };
  struct PerWarp {
    std::array<Operands, kMostPending> pending, formed;
    std::array<size_t, kMostPending> group;
    size_t count = 0, formed_count = 0, groups = 0;
    bool fenced = false;
    std::array<Sums, 2> sums;
    uint64_t issued = 0;  // a digest of all products so far
  };

  Sums* sums_of(PerWarp& warp, float* of, const Place& place) const;
  void take_sums(const Operands& operands, Sums& sums) const;
  void give_back_sums(const Operands& operands, const Sums& sums, const Place& place) const;
  void form(const Operands& operands, Sums& sums) const;
  void count_wanted(const Operands& operands, const float (&left)[16][16]) const;
  float element(const Operands& operands, uint64_t tile, unsigned row, unsigned inner) const;
  void note_reads(const Operands& operands) const;
  void check_tile(const Operands& operands, uint64_t tile, unsigned rows) const;

  Block& block_;
  OrdinaryWrites& writes_;
  std::unique_ptr<PerWarp[]> warps_;
};

// Registers of a block: as a launch shares them out, if a multiprocessor has one block, and as setmaxnreg moves them.
class Registers {
 public:
  explicit Registers(Block& block) : block_(block), per_thread_(kMaxThreads) { waiting_.reserve(kMaxThreads); }
  void renew();

  void give_up(unsigned count, const Place& place);
  void take(unsigned count, const Place& place);

 private:
  unsigned& own(unsigned count, const Place& place);

  Block& block_;
  std::vector<unsigned> per_thread_;
  std::array<unsigned, kMaxCluster> free_ = {};
  std::vector<Thread*> waiting_;
};

class Hopper {
  static constexpr size_t kNoteBytes = size_t{1} << 20;  // more are allocated where they do not suffice
  std::unique_ptr<unsigned char[]> memory_;
  std::pmr::monotonic_buffer_resource notes_;

 public:
  explicit Hopper(Block& block)
      : memory_(new unsigned char[kNoteBytes]),
        notes_(memory_.get(), kNoteBytes),
        barriers(block, &notes_),
        writes(block, &notes_),
        copies(block, &notes_, barriers, writes),
        products(block, writes),
        registers(block) {}

  void renew();
  // What is wrong once all threads have returned, or nothing.
  std::string left_over() const;

  Barriers barriers;
  OrdinaryWrites writes;
  BulkCopies copies;
  GroupProducts products;
  Registers registers;
};

// The steps of products, which a warp's lanes take together, and the inverse of load_matrices. As those in warp.h.
void fence_products(const Place& place);
void commit_products(const Place& place);
void wait_for_products(unsigned pending, const Place& place);
using Widen = float (*)(uint32_t);
void multiply_tiles(Widen widen, float* sums, unsigned columns, uint64_t left_tile, uint64_t right_tile,
                    const Place& place);
void multiply_registers(Widen widen, float* sums, unsigned columns, const uint32_t (&left)[4], uint64_t right_tile,
                        bool accumulates, const Place& place);
void store_matrices(void* row, const uint32_t (&parts)[4], const Place& place);

}  // namespace emulator
