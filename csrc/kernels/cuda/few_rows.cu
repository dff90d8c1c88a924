#include "kernels/cuda/few_rows.h"

namespace petl::cuda {
namespace {

// By the bounds of bench/counts.py, and by its model too, both launches together take less than a sandwich up to some
// 1900 rows, with 50 to 200 inner columns. The second one reads the partial sums anew for every 128 columns of the
// output.
constexpr int64_t kFewRows = 1536;

}  // namespace

// A slice is three chunks deep, which a block copies at once, or as deep as makes eight slices.
FewRows few_rows(int64_t R, int64_t D, int64_t inner, const PackedOperand* operands, bool has_norm,
                 Partition& workspace) {
  constexpr int64_t kMostSlices = 8, kLeastChunks = 3;
  FewRows few;
  const int64_t all = divide_up(D, kFewDepth);
  const int64_t chunks = all > kMostSlices * kLeastChunks ? divide_up(all, kMostSlices) : kLeastChunks;
  if (R > kFewRows || all <= chunks) return few;
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
