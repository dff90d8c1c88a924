#include <algorithm>
#include <cstring>

#include "emulator/counts.h"
#include "emulator/hopper.h"
#include "emulator/unseen.h"

namespace emulator {

void OrdinaryWrites::note(const void* address, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin; at < begin + bytes; at += 16) unshown_[at] = &block_.thread();
}

void OrdinaryWrites::show() {
  for (auto i = unshown_.begin(); i != unshown_.end();) i = i->second == &block_.thread() ? unshown_.erase(i) : ++i;
}

void OrdinaryWrites::require_shown(const unsigned char* begin, size_t bytes, const char* what,
                                   const Place& place) const {
  const auto found = unshown_.lower_bound(reinterpret_cast<uintptr_t>(begin));
  if (found != unshown_.end() && found->first < reinterpret_cast<uintptr_t>(begin) + bytes) {
    block_.fail(place, what, " of what ordinary stores wrote, without fence.proxy.async");
  }
}

void BulkCopies::renew() {
  copies_.clear();
  stores_.clear();
}

// Calls visit(where it goes, its barrier) for each block that receives a copy.
template <class Visit>
void BulkCopies::for_each_target(const Copy& copy, Visit visit) const {
  const SharedMemory& shared = block_.shared();
  for (unsigned rank = 0; rank < block_.cluster(); ++rank) {
    if (!(copy.blocks ? copy.blocks >> rank & 1 : rank == copy.rank)) continue;
    const std::ptrdiff_t offset = shared.begin(rank) - shared.begin(copy.rank);
    visit(copy.to + offset, copy.barrier + offset);
  }
}

void BulkCopies::begin(Copy& copy, const Place& place) {
  copy.rank = block_.rank();
  if (!block_.shared().holds(copy.to, copy.bytes, copy.rank) || !block_.shared().holds(copy.barrier, 8, copy.rank)) {
    block_.fail(place, "a copy to outside of the block's shared memory");
  }
  for_each_target(copy, [&](unsigned char* to, unsigned char* barrier) {
    barriers_.require(barrier, place);
    note_write(to, copy.bytes);  // from now on; the barrier tells when it is done
    counts::add("shared bulk copy bytes", copy.bytes);
    publish(barrier);
  });
  counts::add("bulk copies");
  copies_.push_back(copy);
  if (block_.is_eager()) land_next();
}

void BulkCopies::copy(void* to, const void* from, unsigned bytes, void* barrier, unsigned blocks, const Place& place) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) {
    block_.fail(place, "a bulk copy that is not aligned to 16 bytes");
  }
  Copy copy = {};
  note_read(from, bytes);
  copy.to = static_cast<unsigned char*>(to);
  copy.from = static_cast<const unsigned char*>(from);
  copy.bytes = bytes;
  copy.barrier = static_cast<unsigned char*>(barrier);
  copy.blocks = blocks;
  counts::note_part(false, {const_cast<unsigned char*>(copy.from), 1, bytes, bytes});
  begin(copy, place);
}

void BulkCopies::prefetch(const void* from, unsigned bytes, const Place& place) {
  if ((reinterpret_cast<uintptr_t>(from) | bytes) % 16 || bytes == 0) {
    block_.fail(place, "a prefetch of nothing, or of what is not aligned to 16 bytes");
  }
  note_read(from, bytes);
  counts::add("prefetched bytes", bytes);
  // Read, so that the address sanitizer sees whether it is there.
  const volatile unsigned char* const begin = static_cast<const unsigned char*>(from);
  for (unsigned i = 0; i < bytes; i += 16) static_cast<void>(begin[i]);
}

namespace {

// Of a tile, what lies in the matrix.
counts::Part part_inside(const TensorMap& map, int column, int row) {
  const auto inside = [](int64_t first, int64_t count, uint64_t size) {
    const int64_t begin = std::max<int64_t>(first, 0), end = std::min(first + count, static_cast<int64_t>(size));
    return std::pair<size_t, size_t>(begin, std::max<int64_t>(end - begin, 0));
  };
  const auto [first_row, rows] = inside(row, map.tile_rows, map.rows);
  const auto [first_column, columns] = inside(column, map.tile_columns, map.columns);
  return {map.data + first_row * map.row_bytes + first_column * 2, columns ? rows : 0, columns * 2, map.row_bytes};
}

}  // namespace

void BulkCopies::copy_tile(void* to, const TensorMap& from, int column, int row, void* barrier, const Place& place) {
  // The pattern repeats after 8 rows, and begins there.
  if (reinterpret_cast<uintptr_t>(to) % (8 * from.swizzled_bytes)) block_.fail(place, "a tile that is not aligned");
  Copy copy = {};
  copy.to = static_cast<unsigned char*>(to);
  copy.map = from;
  copy.column = column;
  copy.row = row;
  copy.bytes = static_cast<unsigned>(from.tile_bytes());
  copy.barrier = static_cast<unsigned char*>(barrier);
  counts::note_part(false, part_inside(from, column, row));
  begin(copy, place);
}

namespace {

// What is outside of the matrix is zeros.
void land_tile(unsigned char* to, const TensorMap& map, int first_column, int first_row) {
  const int64_t columns = static_cast<int64_t>(map.columns), row_bytes = static_cast<int64_t>(map.row_bytes);
  for (uint32_t i = 0; i < map.tile_rows; ++i) {
    const int64_t row = int64_t{first_row} + i;
    for (uint32_t byte = 0; byte < map.swizzled_bytes; byte += 4) {
      const uintptr_t plain = reinterpret_cast<uintptr_t>(to) + i * map.swizzled_bytes + byte;
      uint16_t pair[2] = {};
      for (int j = 0; j < 2; ++j) {
        const int64_t column = int64_t{first_column} + byte / 2 + j;
        const bool is_inside = row >= 0 && row < static_cast<int64_t>(map.rows) && column >= 0 && column < columns;
        if (is_inside) std::memcpy(&pair[j], map.data + row * row_bytes + column * 2, 2);
      }
      copy_unseen(reinterpret_cast<void*>(swizzled(plain, map.swizzled_bytes)), pair, 4);
    }
  }
}

}  // namespace

bool BulkCopies::land_next() {
  if (copies_.empty()) return false;
  const auto next = block_.is_forward() ? copies_.begin() : std::prev(copies_.end());
  const Copy copy = *next;
  copies_.erase(next);
  for_each_target(copy, [&](unsigned char* to, unsigned char* barrier) {
    if (copy.from) {
      copy_unseen(to, copy.from, copy.bytes);
    } else {
      land_tile(to, copy.map, copy.column, copy.row);
    }
    barriers_.count_bytes(barrier, copy.bytes);
  });
  return true;
}

void BulkCopies::store_tile(const TensorMap& to, int column, int row, const void* from, const Place& place) {
  const auto* begin = static_cast<const unsigned char*>(from);
  if (!block_.shared().holds(begin, to.tile_bytes(), block_.rank())) {
    block_.fail(place, "a store from outside of shared memory");
  }
  if (reinterpret_cast<uintptr_t>(from) % (8 * to.swizzled_bytes)) block_.fail(place, "a tile that is not aligned");
  writes_.require_shown(begin, to.tile_bytes(), "a store", place);
  Stores& own = stores_[&block_.thread()];
  if (own.count == own.pending.size()) block_.fail(place, "more stores under way than are emulated");
  const counts::Part part = part_inside(to, column, row);
  for (size_t i = 0; i < part.rows; ++i) note_write(part.first + i * part.step, part.row_bytes);
  counts::note_part(true, part);
  counts::add("bulk stores");
  counts::add("shared bulk store bytes", to.tile_bytes());
  own.pending[own.count++] = {to, column, row, begin, own.groups};
  if (block_.is_eager()) finish(own.pending[own.count - 1]);
}

void BulkCopies::finish(const Store& store) const {
  const TensorMap& map = store.map;
  for (uint32_t i = 0; i < map.tile_rows && store.row + i < map.rows; ++i) {
    for (uint32_t byte = 0; byte < map.swizzled_bytes && store.column + byte / 2 < map.columns; byte += 2) {
      const uintptr_t plain = reinterpret_cast<uintptr_t>(store.from) + i * map.swizzled_bytes + byte;
      std::memcpy(map.data + (store.row + i) * map.row_bytes + store.column * 2 + byte,
                  reinterpret_cast<const void*>(swizzled(plain, map.swizzled_bytes)), 2);
    }
  }
}

void BulkCopies::commit_stores() { ++stores_[&block_.thread()].groups; }

void BulkCopies::wait_for_stores(size_t pending) {
  Stores& own = stores_[&block_.thread()];
  size_t done = 0;
  while (done < own.count && own.pending[done].group + pending < own.groups) {
    const Store& store = own.pending[done++];
    note_read(store.from, store.map.tile_bytes());  // until now
    if (!block_.is_eager()) finish(store);
  }
  for (size_t i = done; i < own.count; ++i) own.pending[i - done] = own.pending[i];
  own.count -= done;
}

std::string BulkCopies::left_over() const {
  for (const auto& [thread, own] : stores_) {
    if (own.count) return "returns before its stores have read shared memory";
  }
  return copies_.empty() ? "" : "returns while a copy to its shared memory is under way";
}

}  // namespace emulator
