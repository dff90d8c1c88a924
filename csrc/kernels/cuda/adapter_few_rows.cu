#include "kernels/cuda/adapter_few_rows.h"
#include "kernels/cuda/few_rows_kernels.h"

namespace petl::cuda {

template <class T>
int launch_few_rows(Queue queue, const AdapterForwardOp<T>& op, const FewRows& few) {
  const int error = queue_first_slices<false, true>(queue, op, op.has_norm, few);
  return error ? error : queue_few_outputs(queue, op, few);
}

template int launch_few_rows(Queue, const AdapterForwardOp<Bfloat16>&, const FewRows&);
template int launch_few_rows(Queue, const AdapterForwardOp<Float16>&, const FewRows&);

}  // namespace petl::cuda
