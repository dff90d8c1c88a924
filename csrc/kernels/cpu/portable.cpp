#define PETL_PATH portable
#define PETL_VECTOR_BYTES 16
#ifdef __aarch64__
// 20 of 32 registers accumulate; four hold a row of the panel, five the broadcast factors.
#define PETL_TILE_ROWS 5
#define PETL_PANEL_VECTORS 4
#else
#define PETL_TILE_ROWS 4
#define PETL_PANEL_VECTORS 2
#endif
#include "kernels/cpu/path.inl"
