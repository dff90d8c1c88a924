#include "kernels/cuda/apt_few_rows.h"
#include "kernels/cuda/few_rows_kernels.h"

namespace petl::cuda {

template <class T>
int launch_few_rows(Queue queue, const AptForwardOp<T, false>& op, bool rest, const FewRows& few) {
  return rest ? launch_slices_and_outputs<true, false>(queue, op, false, few)
              : launch_slices_and_outputs<false, false>(queue, op, false, few);
}

template int launch_few_rows(Queue, const AptForwardOp<Bfloat16, false>&, bool, const FewRows&);
template int launch_few_rows(Queue, const AptForwardOp<Float16, false>&, bool, const FewRows&);

}  // namespace petl::cuda
