#ifdef __x86_64__
#define PETL_PATH avx2
#define PETL_TARGET "avx2,fma,f16c"
#define PETL_VECTOR_BYTES 32
// 12 of 16 registers accumulate; two hold a row of the panel, one the broadcast factor.
#define PETL_TILE_ROWS 6
#define PETL_PANEL_VECTORS 2
#include "kernels/cpu/path.inl"
#endif
