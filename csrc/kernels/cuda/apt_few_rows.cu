#include "kernels/cuda/apt_few_rows.h"
#include "kernels/cuda/few_rows_kernels.h"

namespace petl::cuda {

template <class T>
int launch_first_slices(Queue queue, const AptForwardOp<T, false>& op, bool rest, const FewRows& few) {
  return rest ? queue_first_slices<true, false>(queue, op, false, few)
              : queue_first_slices<false, false>(queue, op, false, few);
}

template <class T>
int launch_few_outputs(Queue queue, const AptForwardOp<T, false>& op, const FewRows& few) {
  return queue_few_outputs(queue, op, few);
}

template int launch_first_slices(Queue, const AptForwardOp<Bfloat16, false>&, bool, const FewRows&);
template int launch_first_slices(Queue, const AptForwardOp<Float16, false>&, bool, const FewRows&);
template int launch_few_outputs(Queue, const AptForwardOp<Bfloat16, false>&, const FewRows&);
template int launch_few_outputs(Queue, const AptForwardOp<Float16, false>&, const FewRows&);

}  // namespace petl::cuda
