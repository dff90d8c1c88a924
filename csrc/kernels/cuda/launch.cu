#include "kernels/cuda/launch.h"

namespace petl::cuda {

const char* error_text(int error) {
  if (error == kTooLittleSharedMemory) return "a block of this GPU has too little shared memory for these sizes";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace petl::cuda
