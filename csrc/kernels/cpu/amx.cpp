#include "kernels/cpu/compiled_paths.h"
#ifdef PETL_MATRIX_REGISTERS
#define PETL_PATH amx
#define PETL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define PETL_AVX512_BF16
#define PETL_MATRIX_PRODUCTS
#define PETL_VECTOR_BYTES 64
// As for avx512.
#define PETL_TILE_ROWS 6
#define PETL_PANEL_VECTORS 4
#include "kernels/cpu/path.inl"
#endif
