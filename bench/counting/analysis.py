"""What is known of a launch: the emulator's counts, counts of its machine code, and the bounds that follow."""

import re

from counting import h200
from counting.walk import walk_as_counted

PRODUCTS = ("multiply_bfloat16", "multiply_float16")


def of_emulator(launch):
    """Of all blocks together, and under "block" all counts of the one that asks for most."""
    entry = {
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "threads": launch.threads[0] * launch.threads[1] * launch.threads[2],
        "shared_bytes": launch.shared_bytes,
        "products": sum(launch.total(name) for name in PRODUCTS),
        "barriers": launch.total("barriers"),
        "wavefronts": _total(launch, r"shared .* wavefronts"),
        "least_wavefronts": _total(launch, r"shared .* least"),
        "second_level_bytes": h200.SECTOR * _total(launch, r".* L2"),
        "device_bytes": _device_bytes(launch),
        "block": dict(sorted(launch.counts[launch.busiest].items())),
    }
    if launch.is_whole:
        entry["products_wanted"] = launch.total("products wanted")
    else:
        entry["block"].pop("products wanted", None)
    return entry


def blocks_of(entry):
    x, y, z = entry["grid"]
    return x * y * z


def _total(launch, pattern):
    names = {name for counts in launch.counts.values() for name in counts if re.fullmatch(pattern, name)}
    return sum(launch.total(name) for name in names)


def _device_bytes(launch):
    """Each tensor once, or as much of it as all blocks touch."""
    return sum(
        min(size, h200.SECTOR * launch.sectors_of_all(name, way))
        for name, size in launch.sizes.items()
        for way in ("read", "write")
    )


def private_memory(launch):
    """The (begin, end) of tensors of which most that a block reads is not read by its neighbors too."""
    reads = {name: launch.first_sectors.get(f"{name} read", [0]) for name in launch.sizes}
    private = {name for name, sectors in reads.items() if 2 * sectors[0] >= sum(sectors)}
    return [(begin, end) for name, begin, end in launch.memory if name in private]


def of_code(launch, kernel):
    """Of the block that asks for most, as nvcc has compiled its kernel: of the warp whose stall counts have the
    largest sum, and dead products of all warps.
    """
    code = kernel.code
    walk, is_as_counted = walk_as_counted(code, launch, launch.busiest)
    stalls = [_stall(code.instructions, issued) for issued in walk.issued.T]
    warp = stalls.index(max(stalls))
    shared_bytes = launch.shared_bytes + kernel.static_shared_bytes
    return {
        "registers": kernel.registers,
        "resident_blocks": h200.resident_blocks(walk.issued.shape[1] * h200.WARP, kernel.registers, shared_bytes),
        "instructions": int(walk.issued[:, warp].sum()),
        "stall": stalls[warp],
        "dead_products": _number(code.instructions, walk.off.sum(axis=1), "HMMA"),
        "branches_by_data": sum(walk.by_rule.values()),
        "is_as_counted": is_as_counted,
        "accesses": _accesses(code.instructions, (walk.issued - walk.off).sum(axis=1)),
        "loops": [_of_loop(code, walk, loop, warp) for loop in code.loops if walk.issued[loop.last, warp]],
    }


def _stall(instructions, issued):
    return sum(instruction.stall * int(times) for instruction, times in zip(instructions, issued, strict=True))


def _number(instructions, issued, opcode):
    return sum(int(times) for i, times in zip(instructions, issued, strict=True) if i.opcode == opcode)


def _accesses(instructions, issued):
    """How often all warps together did each kind of memory instruction."""
    found = {}
    for instruction, times in zip(instructions, issued, strict=True):
        if times and instruction.opcode in ("LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS"):
            found[instruction.name] = found.get(instruction.name, 0) + int(times)
    return dict(sorted(found.items()))


def _of_loop(code, walk, loop, warp):
    """Of all its rounds, what is inside it included."""
    inside = slice(loop.first, loop.last + 1)
    instructions, issued, off = code.instructions[inside], walk.issued[inside, warp], walk.off[inside, warp]
    return {
        "at": 16 * loop.first,
        "rounds": int(walk.issued[loop.first, warp]),
        "instructions": int(issued.sum()),
        "stall": _stall(instructions, issued),
        "products": _number(instructions, issued, "HMMA"),
        "dead_products": _number(instructions, off, "HMMA"),
        "matrices": _number(instructions, issued, "LDSM"),
    }


def without_details(entry):
    """What bounds follow from."""
    code = entry["code"] and {name: n for name, n in entry["code"].items() if name not in ("accesses", "loops")}
    return {**{name: n for name, n in entry.items() if name != "block"}, "code": code}


def bounds(entry):
    """{what bounds: nanoseconds}: a launch takes no less, whatever overlaps with what."""
    blocks, code = blocks_of(entry), entry["code"]
    share = h200.divide_up(blocks, h200.MULTIPROCESSORS)  # of the multiprocessor that has most
    wavefronts, products = (h200.divide_up(entry[name], blocks) * share for name in ("wavefronts", "products"))
    found = {
        "device memory": entry["device_bytes"] // h200.MEMORY_SPEED,
        "second-level cache": entry["second_level_bytes"] // h200.SECOND_LEVEL_SPEED,
        "shared memory": h200.nanoseconds(wavefronts),
        "tensor cores": h200.nanoseconds(products * 100 // h200.PRODUCTS_PER_HUNDRED_CLOCKS),
    }
    if code:
        waves = h200.divide_up(blocks, h200.MULTIPROCESSORS * code["resident_blocks"])
        found["stall counts"] = h200.nanoseconds(waves * code["stall"])
    return found
