"""What an H200 can do.

Sizes are those of NVIDIA's data sheet and of CUDA's programming guide. Speeds that are reached are from
micro-benchmarks of Hopper in the literature: they are leads, no measurements of ours.
"""

MULTIPROCESSORS = 132
REGISTERS, SHARED_BYTES, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32  # of a multiprocessor
RESERVED_SHARED_BYTES = 1024  # of each block, for the driver
CLOCK = 1755  # MHz
MEMORY_SPEED = 4300  # GB/s, of the 4800 of the data sheet
SECOND_LEVEL_SPEED = 5500  # GB/s, from the second-level cache to all multiprocessors
# A multiprocessor does one 16 x 8 x 16 product per clock at its peak; mma.sync reaches 62 % of that.
PRODUCTS_PER_HUNDRED_CLOCKS = 62
SECTOR = 32
WARP = 32


def divide_up(count, by):
    return -(-count // by)


def resident_blocks(threads, registers, shared_bytes):
    """Of a kernel on one multiprocessor. Registers are given to warps by 256, shared memory to blocks by 128 bytes."""
    warps = divide_up(threads, WARP)
    warps_by_registers = REGISTERS // (divide_up(registers * WARP, 256) * 256) // 4 * 4
    by_shared = SHARED_BYTES // (divide_up(shared_bytes + RESERVED_SHARED_BYTES, 128) * 128)
    return min(warps_by_registers // warps, by_shared, THREADS // threads, BLOCKS)


def nanoseconds(clocks):
    return clocks * 1000 // CLOCK
