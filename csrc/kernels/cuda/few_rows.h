// Forward of few rows, where one block of threads for all that a row needs would leave most multiprocessors idle. Two
// launches share out what a sandwich (sandwich.h) does in one:
//
//     first_slices     left first, for slices of the width D: partial sums, in float32
//     few_outputs      adds the slices in order, activates as the sandwich does, and multiplies some columns of second
//
// The weights are those that are packed for the sandwich, so that a frozen layer's serve any number of rows.
#pragma once
#include "kernels/cuda/packing.h"
#include "kernels/cuda/row_deviations.h"

namespace petl::cuda {

constexpr int kFewDepth = 64;  // of a chunk of either product

// Weights packed for the layout make such chunks. Floats stay with the sandwich.
template <class Layout>
constexpr bool kSplitsFewRows =
    sizeof(typename Layout::FirstTile::Element) == 2 &&
    (Layout::kFirstDepth == kFewDepth || Layout::kFirstDepth == kFewDepth / 2) && Layout::kSecondDepth == kFewDepth;

// How both launches share out the work.
struct FewRows {
  // Of D: so many slices of so many chunks; one slice where the rows are not few.
  int slices = 1, chunks = 0;
  // How the weights are packed: the depth of the first ones' tiles; the columns of the second ones', and how many
  // follow each other along the depth.
  int first_depth = 0, second_columns = 0, second_depths = 0;
  float* partials = nullptr;         // [slices, R, inner in whole groups]
  Deviations* deviations = nullptr;  // [slices, R]; null: not wanted

  bool exist() const { return slices > 1; }
};

// Of the sizes alone, so that every device and every run adds in the same order. `operands`: first and second as they
// are packed.
FewRows few_rows(int64_t R, int64_t D, int64_t inner, const PackedOperand* operands, bool has_norm,
                 Partition& workspace);

}  // namespace petl::cuda
