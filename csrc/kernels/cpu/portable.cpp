#define PETL_PATH portable
#define PETL_VECTOR_BYTES 16
#define PETL_TILE_ROWS 4
#define PETL_PANEL_VECTORS 2
#include "kernels/cpu/path.inl"
