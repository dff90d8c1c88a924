"""Sizes of tiles: one table, of which bench/triton_registers.py compiles every entry for the devices that it names.

They are fixed, not autotuned at run time: a choice that hangs on a clock would change the order of sums, and with it
bits, from one run to the next.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """What one program of a kernel takes at a time.

    Attributes:
        rows: of activations; of attention_pool tokens.
        depth: of the width D, in products that sum over it.
        columns: of the width D, in products that give it.
        warps: of a program.
        stages: loads in flight.
    """

    rows: int
    depth: int
    columns: int
    warps: int
    stages: int = 2


# By the greatest padded inner size: for tensor cores, and for products that they do not compute.
ROW_TILES = {
    64: (Tiles(64, 32, 64, 8), Tiles(16, 32, 64, 4)),
    128: (Tiles(64, 32, 32, 8), Tiles(16, 16, 32, 8)),
    256: (Tiles(16, 32, 32, 8), Tiles(16, 32, 32, 8)),
    512: (Tiles(16, 16, 32, 8, 1), Tiles(8, 16, 64, 8)),
}
# AMD's have 64 KiB of shared memory, and the registers of a program of four warps are twice as many for each thread.
AMD_ROW_TILES = ROW_TILES | {
    256: (Tiles(32, 32, 32, 4, 1), Tiles(16, 16, 32, 8)),
    512: (Tiles(16, 16, 32, 4, 1), Tiles(16, 16, 32, 4, 1)),
}
# Kernels that drop out of more inner columns than the former take fewer of the width's at a time: draws need registers.
LEAST_CROWDED, CROWDED_COLUMNS = 128, 16
# Of weights' gradients: `rows` are summed over, at most WEIGHT_ROWS of the weight are taken at a time.
WEIGHT_ROWS = 64
WEIGHT_TILES = (Tiles(64, 0, 64, 4), Tiles(32, 0, 64, 8))
COLUMN_TILES = Tiles(32, 0, 64, 4)
# Of attention_pool, by the greatest padded number of heads.
POOL_TILES = {
    32: (Tiles(64, 64, 64, 4), Tiles(32, 32, 64, 4)),
    64: (Tiles(64, 64, 64, 8), Tiles(32, 32, 32, 4)),
}
STATISTICS_TILES = Tiles(256, 0, 0, 4)
TOKENS_PER_SPLIT = 256


def padded(inner):
    """The power of two that a kernel takes an inner size for, at least 16, the least that is multiplied."""
    return max(16, 1 << (inner - 1).bit_length())


def columns_of(tiles, inner, is_crowded):
    """Of the width D, that a kernel of rows takes at a time."""
    return CROWDED_COLUMNS if is_crowded and inner > LEAST_CROWDED else tiles.columns


def tiles_for(table, inner, has_no_tensor_cores):
    return table[min(size for size in table if size >= inner)][has_no_tensor_cores]
