#include "kernels/cpu/compiled_paths.h"
#ifdef PETL_ARM_PATHS
#define PETL_PATH neon_bf16
#define PETL_TARGET "arch=armv8.2-a+bf16"
#define PETL_NEON_BF16
#define PETL_VECTOR_BYTES 16
// As for portable.
#define PETL_TILE_ROWS 5
#define PETL_PANEL_VECTORS 4
#include "kernels/cpu/path.inl"
#endif
