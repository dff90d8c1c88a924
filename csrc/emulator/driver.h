// The driver's interface, as far as maps of tiles need it.
#pragma once
#include <cstring>

#include "emulator/cuda_on_cpu.h"
#include "emulator/hopper.h"

#define CUDART_VERSION 13000

using CUtensorMap = emulator::TensorMap;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B = 1,
  CU_TENSOR_MAP_SWIZZLE_64B = 2,
  CU_TENSOR_MAP_SWIZZLE_128B = 3,
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// Two dimensions, 16-bit elements, and a row of the tile as wide as the swizzle.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* tile,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t row_bytes = 16u << swizzle;
  const bool sizes_fit = rank == 2 && sizes[0] && sizes[1] && sizes[0] >> 32 == 0 && sizes[1] >> 32 == 0 &&
                         tile[0] * 2 == row_bytes && tile[1] >= 1 && tile[1] <= 256;
  const bool is_aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 && strides[0] >> 40 == 0;
  if (!sizes_fit || !is_aligned || swizzle == 0 || steps[0] != 1 || steps[1] != 1) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<unsigned char*>(data), sizes[0], sizes[1], strides[0], tile[0], tile[1], row_bytes};
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function =
      std::strcmp(name, "cuTensorMapEncodeTiled") == 0 ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = cudaDriverEntryPointSuccess;
  return *function ? cudaSuccess : cudaErrorInvalidValue;
}
