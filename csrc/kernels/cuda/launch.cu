#include "kernels/cuda/launch.h"

namespace petl::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace petl::cuda
