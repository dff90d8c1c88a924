"""What is known of a launch: counts of the emulator, counts of its machine code, and the bounds that follow."""

import re

from counting import h200
from counting.walk import times_of, walk_as_counted

PRODUCTS = ("multiply_bfloat16", "multiply_float16")


def _sum(launch, pattern, per_block=None):
    """Over all counts whose names match: of the middle block, or of all blocks together."""
    names = {name for counts in launch.counts.values() for name in counts if re.fullmatch(pattern, name)}
    get = launch.counts[launch.middle].get if per_block else launch.total
    return sum(get(name, 0) if per_block else get(name) for name in names)


def emulated(launch):
    """The middle block's counts, and those of the launch that bounds need."""
    block = dict(sorted(launch.counts[launch.middle].items()))
    return {
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "threads": launch.threads[0] * launch.threads[1] * launch.threads[2],
        "shared_bytes": launch.shared_bytes,
        "products": sum(launch.total(name) for name in PRODUCTS),
        "products_wanted": launch.total("products wanted"),
        "wavefronts": _sum(launch, r"shared .* wavefronts"),
        "least_wavefronts": _sum(launch, r"shared .* least"),
        "second_level_bytes": h200.SECTOR * _sum(launch, r".* L2"),
        "device_bytes": _device_bytes(launch),
        "block": block,
    }


def _device_bytes(launch):
    """Each tensor once, or as much of it as all blocks touch."""
    sizes = {}
    for name, begin, end in launch.memory:
        sizes[name] = sizes.get(name, 0) + end - begin
    return sum(
        min(size, h200.SECTOR * launch.total(f"{name} {way} distinct"))
        for name, size in sizes.items()
        for way in ("read", "write")
    )


def _loop(kernel, walk, loop):
    inside = slice(loop.first, loop.last + 1)
    heads = walk.issued[loop.first]
    warp = int(heads.argmax())
    rounds = int(heads[warp])
    instructions = kernel.instructions[inside]
    issued = walk.issued[inside, warp]
    return {
        "at": 16 * loop.first,
        "rounds": rounds,
        "instructions": int(issued.sum()),
        "stall": int(sum(i.stall * int(n) for i, n in zip(instructions, issued, strict=True))),
        "products": int(sum(n for i, n in zip(instructions, issued, strict=True) if i.opcode == "HMMA")),
        "dead_products": int(
            sum(n for i, n in zip(instructions, walk.off[inside, warp], strict=True) if i.opcode == "HMMA")
        ),
        "matrices": int(sum(n for i, n in zip(instructions, issued, strict=True) if i.opcode == "LDSM")),
    }


def compiled(launch, kernel):
    """Of the middle block, as nvcc has compiled the kernel."""
    code = kernel.code
    walk, is_as_counted = walk_as_counted(code, launch, launch.middle)
    stalls = [sum(i.stall * int(n) for i, n in zip(code.instructions, issued, strict=True)) for issued in walk.issued.T]
    warp = stalls.index(max(stalls))
    shared = launch.shared_bytes + kernel.static_shared_bytes
    threads = walk.issued.shape[1] * h200.WARP
    products = [place for place, i in enumerate(code.instructions) if i.opcode == "HMMA"]
    return {
        "registers": kernel.registers,
        "resident_blocks": h200.resident_blocks(threads, kernel.registers, shared),
        "instructions": int(walk.issued[:, warp].sum()),
        "stall": stalls[warp],
        "dead_products": int(walk.off[products].sum()),
        "requests": {
            opcode: times_of(code, walk, opcode) for opcode in ("LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS", "BAR")
        },
        "by_rule": sum(walk.by_rule.values()),
        "is_as_counted": is_as_counted,
        "loops": [_loop(code, walk, loop) for loop in code.loops if walk.issued[loop.last].any()],
    }


def bounds(counts, code=None):
    """In nanoseconds; stalls are 0 where the code is not known."""
    blocks = counts["grid"][0] * counts["grid"][1] * counts["grid"][2]
    # Of the multiprocessor that has most blocks.
    share = h200.divide_up(blocks, h200.MULTIPROCESSORS)
    wavefronts, products = (h200.divide_up(counts[name], blocks) * share for name in ("wavefronts", "products"))
    waves = h200.divide_up(blocks, h200.MULTIPROCESSORS * code["resident_blocks"]) if code else 0
    return h200.Bounds(
        device_memory=counts["device_bytes"] // h200.MEMORY_SPEED,
        second_level=counts["second_level_bytes"] // h200.SECOND_LEVEL_SPEED,
        shared_memory=h200.nanoseconds(wavefronts),
        tensor_cores=h200.nanoseconds(products * 100 // h200.PRODUCTS_PER_HUNDRED_CLOCKS),
        stalls=h200.nanoseconds(waves * code["stall"]) if code else 0,
    )
