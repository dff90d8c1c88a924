#include "kernels/cuda/few_rows.h"

namespace petl::cuda {
namespace {

// How few rows are few. More are better served by a sandwich, as counted: it reads less of the second-level cache, the
// more so the more inner columns there are.
struct Limit {
  int64_t inner, rows;
};
constexpr Limit kFewRows[] = {{64, 2048}, {128, 1536}, {256, 1024}, {512, 512}};

bool are_few(int64_t R, int64_t inner) {
  for (const Limit& limit : kFewRows) {
    if (inner <= limit.inner) return R <= limit.rows;
  }
  return false;
}

}  // namespace

// A slice is three chunks deep, which a block copies at once, or as deep as makes eight slices.
FewRows few_rows(int64_t R, int64_t D, int64_t inner, const PackedOperand* operands, bool has_norm,
                 Partition& workspace) {
  constexpr int64_t kMostSlices = 8, kLeastChunks = 3;
  FewRows few;
  const int64_t all = divide_up(D, kFewDepth);
  const int64_t chunks = all > kMostSlices * kLeastChunks ? divide_up(all, kMostSlices) : kLeastChunks;
  if (!are_few(R, inner) || all <= chunks) return few;
  few.chunks = static_cast<int>(chunks);
  few.slices = static_cast<int>(divide_up(all, chunks));
  few.first_depth = operands[0].unit_depth;
  few.second_columns = operands[1].cut.groups * kUnitColumns;
  few.second_depths = operands[1].cut.depths;
  few.partials = workspace.take<float>(few.slices * R * round_up(inner, kUnitColumns));
  if (has_norm) few.deviations = workspace.take<Deviations>(few.slices * R);
  return few;
}

}  // namespace petl::cuda
