"""What a launch of the Hopper path asks for, of all its blocks together."""

from counting import h200

OF_PRODUCT = 16 * 8 * 16  # multiply-adds
# No matrices of rows: packed weights, rooms of blocks, and at most three numbers of a row.
BESIDE_ROWS = ("gate", "log_scale", "packed", "room", "shares", "statistics", "vectors")


def of_launch(launch):
    """Its counts by their names, and under "device" the bytes of each tensor that come or go: sectors that any block
    touches, each once.
    """
    names = sorted({name for counts in launch.counts.values() for name in counts})
    return {
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "cluster": launch.cluster,
        "threads": launch.threads[0],
        "shared_bytes": launch.shared_bytes,
        "device": {name: h200.SECTOR * number for name, number in launch.sectors.items()},
        "counts": {name: sum(counts.get(name, 0) for counts in launch.counts.values()) for name in names},
    }


def tensors(entry):
    """("x", "read") of each tensor that is read or written."""
    return [tuple(name.rsplit(" ", 1)) for name in entry["device"]]


def device_bytes(entry, way):
    return sum(number for name, number in entry["device"].items() if name.endswith(f" {way}"))


def second_level_bytes(entry):
    """That come from the second-level cache: copies pass the first level by."""
    return h200.SECTOR * sum(number for name, number in entry["counts"].items() if name.endswith(" read L2"))


def wavefronts(entry):
    """Of shared memory, by what threads load and store on their own."""
    return sum(number for name, number in entry["counts"].items() if name.endswith(" wavefronts"))


def of_rows(entry, way, of="device"):
    """Bytes of the matrices of rows alone: of device memory, or as often as they are asked for ("counts")."""
    names = [name for name, its_way in tensors(entry) if its_way == way and name not in BESIDE_ROWS]
    if of == "device":
        return sum(entry["device"][f"{name} {way}"] for name in names)
    return sum(entry["counts"][f"{name} {way} bytes"] for name in names)
