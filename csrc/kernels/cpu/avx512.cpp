#ifdef __x86_64__
#define PETL_PATH avx512
#define PETL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define PETL_VECTOR_BYTES 64
// 24 of 32 registers accumulate; four hold a row of the panel, one the broadcast factor.
#define PETL_TILE_ROWS 6
#define PETL_PANEL_VECTORS 4
#include "kernels/cpu/path.inl"
#endif
