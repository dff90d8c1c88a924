// Maps by which copies find tiles of a matrix (hopper_ptx.h).
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace petl::cuda {

using EncodeTiles = decltype(&cuTensorMapEncodeTiled);

// The driver's function, since its library is not linked; null where it has none.
inline EncodeTiles tile_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const char* const name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) return reinterpret_cast<EncodeTiles>(function);
  cudaGetLastError();  // it would be blamed on the next call
  return nullptr;
}

// Of 16-bit elements [rows, columns], `stride` elements from row to row, by tiles of 64 columns and so many rows. False
// where the driver refuses.
inline bool encode_tiles(EncodeTiles encode, CUtensorMap& map, CUtensorMapDataType type, const void* data, int64_t rows,
                         int64_t columns, int64_t stride, int tile_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t tile[] = {64, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1};
  return encode(&map, type, 2, const_cast<void*>(data), sizes, strides, tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace petl::cuda
