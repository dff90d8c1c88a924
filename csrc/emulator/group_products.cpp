#include <cstring>

#include "emulator/counts.h"
#include "emulator/half.h"
#include "emulator/hopper.h"
#include "emulator/unseen.h"
#include "emulator/warp.h"

namespace emulator {
namespace {

// What sums hold while they are under way: a NaN that no arithmetic makes.
constexpr uint32_t kUnderWay = 0x7fa5a5a5;

// A descriptor's fields: the address and the step from 8 rows to the next in units of 16 bytes, and the kind of
// swizzle.
struct TileFields {
  uint32_t address, eight_rows, row_bytes;

  explicit TileFields(uint64_t tile)
      : address((tile & 0x3fff) << 4), eight_rows((tile >> 32 & 0x3fff) << 4), row_bytes(256u >> (tile >> 62)) {}

  // Of 16 bytes of a row, without swizzle.
  uint32_t plain(unsigned row, unsigned byte) const {
    return address + row / 8 * eight_rows + row % 8 * row_bytes + byte;
  }
};

}  // namespace

void GroupProducts::renew() {
  for (unsigned i = 0; i < kMaxThreads / kLanes; ++i) {
    PerWarp& warp = warps_[i];
    warp.count = warp.formed_count = warp.groups = 0;
    warp.fenced = false;
    for (Sums& sums : warp.sums) sums.users = 0;
    warp.issued = 0;
  }
}

// Where the sums' values are that are under way, or room for them.
GroupProducts::Sums* GroupProducts::sums_of(PerWarp& warp, float* of, const Place& place) const {
  Sums* free = nullptr;
  for (Sums& sums : warp.sums) {
    if (sums.users && sums.of == of) return &sums;
    if (!sums.users) free = &sums;
  }
  if (!free) block_.fail(place, "more sums under way than are emulated");
  free->of = of;
  return free;
}

void GroupProducts::take_sums(const Operands& operands, Sums& sums) const {
  const size_t count = operands.columns / 2;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    copy_unseen(&sums.values[lane * count], operands.sums[lane], count * sizeof(float));
    for (size_t i = 0; i < count; ++i) operands.sums[lane][i] = float_of(kUnderWay);
  }
}

void GroupProducts::give_back_sums(const Operands& operands, const Sums& sums, const Place& place) const {
  const size_t count = operands.columns / 2;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    for (size_t i = 0; i < count; ++i) {
      if (bits_of(operands.sums[lane][i]) == kUnderWay) continue;
      block_.fail(place, "sums changed while products add to them");
    }
    copy_unseen(operands.sums[lane], &sums.values[lane * count], count * sizeof(float));
  }
}

namespace {

// Products are of 16 x 8 x 16, as mma.sync's. All of a group's warps meet the same right tile, which is read once.
void count_issued(const GroupProducts::Operands& operands) {
  constexpr unsigned kRowBytes = 16 * 2, kWarpRows = 16;
  const unsigned left_rows = operands.left_in_registers ? 0 : kWarpRows;
  const unsigned right_rows = operands.warp_in_group == 0 ? operands.columns : 0;
  counts::add("group products", operands.columns / 8);
  counts::add("shared product bytes", (left_rows + right_rows) * kRowBytes);
}

// Bits of the depth at which there is something: what pads a matrix holds zeros or, where nobody has written, NaN.
uint32_t depth_of(const float (&values)[16]) {
  uint32_t depth = 0;
  for (unsigned inner = 0; inner < 16; ++inner) {
    const float value = values[inner];
    if (value == value && value != 0) depth |= uint32_t{1} << inner;
  }
  return depth;
}

}  // namespace

void GroupProducts::multiply(const Operands& operands) {
  PerWarp& own = warps_[block_.warp()];
  if (!own.fenced) block_.fail(*operands.place, "a product without wgmma.fence since the last wait");
  if (own.count == kMostPending) block_.fail(*operands.place, "more products under way than are emulated");
  check_tile(operands, operands.right_tile, operands.columns);
  if (!operands.left_in_registers) check_tile(operands, operands.left_tile, 64);
  count_issued(operands);
  constexpr uint64_t kPrime = 0x100000001b3;
  own.issued = (own.issued * kPrime + operands.right_tile) * kPrime +
               (operands.left_in_registers ? operands.columns : operands.left_tile) + 1;
  Sums& sums = *sums_of(own, operands.sums[0], *operands.place);
  if (sums.users == 0) take_sums(operands, sums);
  ++sums.users;
  own.group[own.count] = own.groups;
  copy_unseen(&own.pending[own.count++], &operands, sizeof operands);
  if (block_.is_eager()) form(operands, sums);
}

void GroupProducts::wait(size_t pending, const Place& place) {
  PerWarp& own = warps_[block_.warp()];
  own.fenced = false;
  size_t done = 0;
  for (; done < own.count && own.group[done] + pending < own.groups; ++done) {
    const Operands& operands = own.pending[done];
    copy_unseen(&own.formed[own.formed_count++], &operands, sizeof operands);
    Sums& sums = *sums_of(own, operands.sums[0], place);
    if (!block_.is_eager()) form(operands, sums);
    if (--sums.users == 0) give_back_sums(operands, sums, place);
  }
  for (size_t i = done; i < own.count; ++i) {
    own.group[i - done] = own.group[i];
    copy_unseen(&own.pending[i - done], &own.pending[i], sizeof(Operands));
  }
  own.count -= done;
}

std::string GroupProducts::left_over() const {
  for (unsigned warp = 0; warp < kMaxThreads / kLanes; ++warp) {
    if (warps_[warp].count) return "returns without having waited for its products";
    if (warps_[warp].issued != warps_[warp / 4 * 4].issued) return "warps of a group have issued different products";
  }
  return {};
}

void GroupProducts::check_tile(const Operands& operands, uint64_t tile, unsigned rows) const {
  const TileFields fields(tile);
  const uint32_t begin = fields.address - kSharedBase,
                 end = begin + (rows - 1) / 8 * fields.eight_rows + 7 * fields.row_bytes + 32;
  const bool is_inside = fields.address >= kSharedBase && end <= block_.shared().bytes();
  const char* const error = tile >> 62 == 0  ? "a tile without swizzle: not emulated"
                            : tile >> 49 & 7 ? "a tile with a base offset: not emulated"
                            : !is_inside     ? "a tile outside of shared memory"
                            : fields.address & 7 * fields.row_bytes
                                ? "a tile that does not begin with the swizzle's pattern"
                                : nullptr;
  if (error) block_.fail(*operands.place, error);
  for (unsigned row = 0; row < rows; row += 8) {
    const size_t bytes = 8 * fields.row_bytes - begin % fields.row_bytes;
    writes_.require_shown(operands.shared + begin + row / 8 * fields.eight_rows, bytes, "a product", *operands.place);
  }
}

void GroupProducts::note_reads() {
  PerWarp& own = warps_[block_.warp()];
  for (size_t i = 0; i < own.formed_count; ++i) note_reads(own.formed[i]);
  own.formed_count = 0;
}

void GroupProducts::note_reads(const Operands& operands) const {
  const auto note = [&](uint64_t tile, unsigned first_row, unsigned rows) {
    const TileFields fields(tile);
    for (unsigned row = first_row; row < first_row + rows; ++row) {
      for (unsigned byte = 0; byte < 32; byte += 16) {
        note_read(operands.shared + swizzled(fields.plain(row, byte), fields.row_bytes) - kSharedBase, 16);
      }
    }
  };
  note(operands.right_tile, 0, operands.columns);
  if (!operands.left_in_registers) note(operands.left_tile, operands.warp_in_group * 16, 16);
}

float GroupProducts::element(const Operands& operands, uint64_t tile, unsigned row, unsigned inner) const {
  const TileFields fields(tile);
  uint16_t bits;
  std::memcpy(&bits, operands.shared + swizzled(fields.plain(row, inner * 2), fields.row_bytes) - kSharedBase, 2);
  return operands.widen(bits);
}

// A product of 16 x 8 x 16 is wanted if a term of it is.
void GroupProducts::count_wanted(const Operands& operands, const float (&left)[16][16]) const {
  uint32_t left_depth = 0;
  for (const auto& row : left) left_depth |= depth_of(row);
  uint64_t wanted = 0;
  for (unsigned first = 0; first < operands.columns; first += 8) {
    uint32_t right_depth = 0;
    for (unsigned column = first; column < first + 8; ++column) {
      float right[16];
      for (unsigned inner = 0; inner < 16; ++inner)
        right[inner] = element(operands, operands.right_tile, column, inner);
      right_depth |= depth_of(right);
    }
    wanted += (left_depth & right_depth) != 0;
  }
  counts::add("group products wanted", wanted);
}

void GroupProducts::form(const Operands& operands, Sums& sums) const {
  float left[16][16];
  for (unsigned lane = 0; operands.left_in_registers && lane < kLanes; ++lane) {
    for (unsigned part = 0; part < 4; ++part) {
      float* const to = &left[lane / 4 + part % 2 * 8][lane % 4 * 2 + part / 2 * 8];
      to[0] = operands.widen(operands.left[lane][part] & 0xffff);
      to[1] = operands.widen(operands.left[lane][part] >> 16);
    }
  }
  for (unsigned row = 0; !operands.left_in_registers && row < 16; ++row) {
    for (unsigned inner = 0; inner < 16; ++inner) {
      left[row][inner] = element(operands, operands.left_tile, operands.warp_in_group * 16 + row, inner);
    }
  }
  if constexpr (counts::kOn) count_wanted(operands, left);
  for (unsigned column = 0; column < operands.columns; ++column) {
    float right[16];
    for (unsigned inner = 0; inner < 16; ++inner) right[inner] = element(operands, operands.right_tile, column, inner);
    for (unsigned row = 0; row < 16; ++row) {
      const unsigned lane = row % 8 * 4 + column % 8 / 2;
      float& sum = sums.values[lane * operands.columns / 2 + column / 8 * 4 + row / 8 * 2 + column % 2];
      float total = operands.accumulates ? sum : 0;
      for (unsigned inner = 0; inner < 16; ++inner) total += left[row][inner] * right[inner];
      sum = total;
    }
  }
}

namespace {

struct Product : Contribution {
  Widen widen;
  float* sums;
  const uint32_t* left;  // null: shared memory
  uint64_t left_tile, right_tile;
  unsigned columns;
  bool accumulates;

  bool agrees_with(const Product& other) const {
    return left_tile == other.left_tile && right_tile == other.right_tile && accumulates == other.accumulates;
  }

  static void resolve(const Warp& warp, uint32_t) {
    const auto own = [&](unsigned lane) { return static_cast<const Product*>(warp.contributions[lane]); };
    const Product& first = *own(0);
    GroupProducts::Operands all;
    all.left_in_registers = first.left != nullptr;
    all.accumulates = first.accumulates;
    all.left_tile = first.left_tile;
    all.right_tile = first.right_tile;
    all.columns = first.columns;
    all.warp_in_group = running->warp_in_block() % 4;
    all.widen = first.widen;
    all.shared = running->shared_memory();
    all.place = first.place;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const Product& its = *own(lane);
      all.sums[lane] = its.sums;
      for (unsigned part = 0; part < 4; ++part) all.left[lane][part] = its.left ? its.left[part] : 0;
      if (!its.agrees_with(first)) running->fail(*all.place, "lanes name different tiles");
    }
    running->hopper().products.multiply(all);
  }
};

struct StoreMatrices : Contribution {
  unsigned char* row;
  const uint32_t* parts;

  static void resolve(const Warp& warp, uint32_t) {
    const auto own = [&](unsigned lane) { return static_cast<const StoreMatrices*>(warp.contributions[lane]); };
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      for (unsigned matrix = 0; matrix < 4; ++matrix) {
        copy_unseen(own(matrix * 8 + lane / 4)->row + lane % 4 * 4, &own(lane)->parts[matrix], 4);
      }
    }
  }
};

struct Wait : Contribution {
  unsigned pending;

  static void resolve(const Warp& warp, uint32_t) {
    const Wait& own = *static_cast<const Wait*>(warp.contributions[0]);
    running->hopper().products.wait(own.pending, *own.place);
  }
};

constexpr Operation kProduct{"wgmma.mma_async", true, false, &Product::resolve};
constexpr Operation kFence{"wgmma.fence", true, false,
                           [](const Warp&, uint32_t) { running->hopper().products.fence(); }};
constexpr Operation kCommit{"wgmma.commit_group", true, false,
                            [](const Warp&, uint32_t) { running->hopper().products.commit(); }};
constexpr Operation kWait{"wgmma.wait_group", true, false, &Wait::resolve};
constexpr Operation kStoreMatrices{"store_matrices", true, false, &StoreMatrices::resolve};

}  // namespace

void fence_products(const Place& place) { running->meet_warp({&kFence, kAllLanes, &place}); }

void commit_products(const Place& place) { running->meet_warp({&kCommit, kAllLanes, &place}); }

void wait_for_products(unsigned pending, const Place& place) {
  running->meet_warp(Wait{{&kWait, kAllLanes, &place}, pending});
  if (running->lane() == 0) running->hopper().products.note_reads();
}

void multiply_tiles(Widen widen, float* sums, unsigned columns, uint64_t left_tile, uint64_t right_tile,
                    const Place& place) {
  running->meet_warp(
      Product{{&kProduct, kAllLanes, &place}, widen, sums, nullptr, left_tile, right_tile, columns, true});
}

void multiply_registers(Widen widen, float* sums, unsigned columns, const uint32_t (&left)[4], uint64_t right_tile,
                        bool accumulates, const Place& place) {
  running->meet_warp(Product{{&kProduct, kAllLanes, &place}, widen, sums, left, 0, right_tile, columns, accumulates});
}

void store_matrices(void* row, const uint32_t (&parts)[4], const Place& place) {
  running->check_shared(row, "store_matrices", place);
  running->meet_warp(StoreMatrices{{&kStoreMatrices, kAllLanes, &place}, static_cast<unsigned char*>(row), parts});
  note_write(row, 16);
  counts::note_stored_matrices(row, place);
  running->hopper().writes.note(row, 16);
}

}  // namespace emulator
