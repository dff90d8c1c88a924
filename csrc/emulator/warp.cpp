#include "emulator/warp.h"

#include <cstring>

#include "emulator/counts.h"
#include "emulator/half.h"

namespace emulator {
namespace {

// Calls `act` with each of the lanes and what it brought.
template <class Own, class Act>
void for_each(const Warp& warp, uint32_t lanes, Act act) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    act(lane, *static_cast<const Own*>(warp.contributions[lane]));
  }
}

struct Vote : Contribution {
  bool predicate;
  uint32_t* received;

  static void resolve(const Warp& warp, uint32_t lanes) {
    uint32_t votes = 0;
    for_each<Vote>(warp, lanes, [&](unsigned lane, const Vote& own) { votes |= uint32_t{own.predicate} << lane; });
    for_each<Vote>(warp, lanes, [&](unsigned, const Vote& own) { *own.received = votes; });
  }
};

struct Shuffle : Contribution {
  uint64_t bits;
  uint64_t* received;
  unsigned source;

  static void resolve(const Warp& warp, uint32_t lanes) {
    for_each<Shuffle>(warp, lanes, [&](unsigned, const Shuffle& own) {
      const bool there = lanes >> own.source & 1;
      *own.received = there ? static_cast<const Shuffle*>(warp.contributions[own.source])->bits : ~uint64_t{0};
    });
  }
};

// The lane's row, and of each matrix the elements lane % 4 * 2 and the next of row (transposed: column) lane / 4.
struct LoadMatrices : Contribution {
  uint32_t* parts;
  const unsigned char* row;

  static const unsigned char* row_of(const Warp& warp, unsigned lane) {
    return static_cast<const LoadMatrices*>(warp.contributions[lane])->row;
  }

  static void resolve(const Warp& warp, uint32_t lanes) {
    for_each<LoadMatrices>(warp, lanes, [&](unsigned lane, const LoadMatrices& own) {
      for (unsigned matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&own.parts[matrix], row_of(warp, matrix * 8 + lane / 4) + lane % 4 * 4, 4);
      }
    });
  }

  static void resolve_transposed(const Warp& warp, uint32_t lanes) {
    for_each<LoadMatrices>(warp, lanes, [&](unsigned lane, const LoadMatrices& own) {
      for (unsigned matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (unsigned i = 0; i < 2; ++i) {
          std::memcpy(&pair[i], row_of(warp, matrix * 8 + lane % 4 * 2 + i) + lane / 4 * 2, 2);
        }
        own.parts[matrix] = pair[0] | uint32_t{pair[1]} << 16;
      }
    });
  }
};

using FourColumns = float __attribute__((vector_size(16)));

// Whether a product has a term of rows, columns and depth that are really there. What pads them holds zeros or, where
// nobody has written, NaN.
bool is_wanted(const float (&left)[16][16], const FourColumns (&right)[16][2]) {
  const auto is_there = [](float value) { return value == value && value != 0; };
  for (unsigned inner = 0; inner < 16; ++inner) {
    bool in_left = false, in_right = false;
    for (unsigned row = 0; row < 16; ++row) in_left |= is_there(left[row][inner]);
    for (unsigned column = 0; column < 8; ++column) in_right |= is_there(right[inner][column / 4][column % 4]);
    if (in_left && in_right) return true;
  }
  return false;
}

template <class Half>
struct Multiply : Contribution {
  float* sums;            // rows lane / 4 and that + 8, columns lane % 4 * 2 and the next
  const uint32_t* left;   // those rows, inner lane % 4 * 2 and the next; the same, inner + 8
  const uint32_t* right;  // inner lane % 4 * 2 and the next, that + 8; column lane / 4

  static void resolve(const Warp& warp, uint32_t lanes) {
    float left[16][16];
    FourColumns right[16][2], sums[16][2];
    for_each<Multiply>(warp, lanes, [&](unsigned lane, const Multiply& own) {
      const unsigned outer = lane / 4, pair = lane % 4 * 2;
      for (unsigned part = 0; part < 4; ++part) {
        float* to = &left[outer + part % 2 * 8][pair + part / 2 * 8];
        to[0] = Half::widen(own.left[part] & 0xffff);
        to[1] = Half::widen(own.left[part] >> 16);
      }
      for (unsigned part = 0; part < 2; ++part) {
        right[pair + part * 8][outer / 4][outer % 4] = Half::widen(own.right[part] & 0xffff);
        right[pair + part * 8 + 1][outer / 4][outer % 4] = Half::widen(own.right[part] >> 16);
        std::memcpy(reinterpret_cast<float*>(sums[outer + part * 8]) + pair, own.sums + part * 2, 8);
      }
    });
    if constexpr (counts::kOn) counts::add("products wanted", is_wanted(left, right));
    for (unsigned row = 0; row < 16; ++row) {
      FourColumns low = sums[row][0], high = sums[row][1];
      for (unsigned inner = 0; inner < 16; ++inner) {
        low += left[row][inner] * right[inner][0];
        high += left[row][inner] * right[inner][1];
      }
      sums[row][0] = low;
      sums[row][1] = high;
    }
    for_each<Multiply>(warp, lanes, [&](unsigned lane, const Multiply& own) {
      for (unsigned part = 0; part < 2; ++part) {
        std::memcpy(own.sums + part * 2, reinterpret_cast<float*>(sums[lane / 4 + part * 8]) + lane % 4 * 2, 8);
      }
    });
  }
};

constexpr Operation kSynchronize{"__syncwarp", false, true, [](const Warp&, uint32_t) {}};
constexpr Operation kVote{"a vote", false, false, &Vote::resolve};
constexpr Operation kShuffle{"a shuffle", false, false, &Shuffle::resolve};
constexpr Operation kLoadMatrices{"load_matrices", true, false, &LoadMatrices::resolve};
constexpr Operation kLoadTransposed{"load_matrices_transposed", true, false, &LoadMatrices::resolve_transposed};
constexpr Operation kMultiplyBfloat16{"multiply_bfloat16", true, false, &Multiply<Bfloat16>::resolve};
constexpr Operation kMultiplyFloat16{"multiply_float16", true, false, &Multiply<Float16>::resolve};

void load(const Operation& operation, uint32_t (&parts)[4], const void* row, const Place& place) {
  running->check_shared(row, operation.name, place);
  note_read(row, 16);
  counts::note_matrices(row, place);
  running->meet_warp(LoadMatrices{{&operation, kAllLanes, &place}, parts, static_cast<const unsigned char*>(row)});
}

}  // namespace

void synchronize(uint32_t mask, const Place& place) { running->meet_warp({&kSynchronize, mask, &place}); }

uint32_t vote(uint32_t mask, bool predicate, const Place& place) {
  uint32_t votes;
  running->meet_warp(Vote{{&kVote, mask, &place}, predicate, &votes});
  return votes;
}

uint64_t shuffle_bits(uint32_t mask, uint64_t bits, unsigned source, const Place& place) {
  uint64_t received;
  running->meet_warp(Shuffle{{&kShuffle, mask, &place}, bits, &received, source});
  return received;
}

void load_matrices(uint32_t (&parts)[4], const void* row, const Place& place) {
  load(kLoadMatrices, parts, row, place);
}

void load_matrices_transposed(uint32_t (&parts)[4], const void* row, const Place& place) {
  load(kLoadTransposed, parts, row, place);
}

void multiply_bfloat16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], const Place& place) {
  running->meet_warp(Multiply<Bfloat16>{{&kMultiplyBfloat16, kAllLanes, &place}, sums, left, right});
}

void multiply_float16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], const Place& place) {
  running->meet_warp(Multiply<Float16>{{&kMultiplyFloat16, kAllLanes, &place}, sums, left, right});
}

}  // namespace emulator
