"""The Hopper path's counts as Markdown."""

from collections import Counter

from counting import hopper
from counting.tables import table

HEAD = """# What the Hopper path's kernels ask of the machine

Counted without a GPU, by `python bench/hopper_counts.py --write`; nothing here is a measurement. csrc/README.md says
how, under "Counts". D = 768, bfloat16; of backward the launch of the rows. What packing the weights asks for is in
the JSON.

Of all blocks together. Megabytes of device memory: each tensor once. *L2*: what comes from the second-level cache,
copies to several blocks once. Products are of 16 x 8 x 16, in thousands; wanted are those that have a term other than
zero. Of shared memory: megabytes that copies bring, that products take and that stores send, and thousands of
wavefronts of what threads load and store. Barriers: thousands of arrivals (of which at another block's), of threads'
waits, and of phases; barriers of a block or of a cluster, one by one.
"""
TENSORS_HEAD = """
## Tensors

At 15360 rows: megabytes that requests ask for, and that come from or go to device memory if each sector does so once.
"""
COLUMNS = (
    *("case", "kernel", "rows", "blocks", "read", "written", "L2", "products", "wanted"),
    *("copied", "multiplied", "stored", "wavefronts", "arrivals", "waits", "phases", "barriers"),
)
TENSOR_COLUMNS = ("case", "tensor", "asked for", "of device memory")
TENSOR_ROWS = 15360


def _millions(number):
    return f"{number / 1e6:.2f}"


def _thousands(number):
    return f"{number / 1e3:.1f}"


def _launches(cases):
    for case, sizes in cases.items():
        yield from ((case, rows, entries[-1]) for rows, entries in sizes.items())


def _asked(cases):
    for case, rows, entry in _launches(cases):
        counts = Counter(entry["counts"])  # what was never counted is zero
        elsewhere = counts["arrivals at another block"]
        yield [
            case,
            f"`{entry['kernel']}`",
            rows,
            entry["grid"][0],
            _millions(hopper.device_bytes(entry, "read")),
            _millions(hopper.device_bytes(entry, "write")),
            _millions(hopper.second_level_bytes(entry)),
            *(_thousands(counts[name]) for name in ("group products", "group products wanted")),
            *(_millions(counts[f"shared {what} bytes"]) for what in ("bulk copy", "product", "bulk store")),
            _thousands(hopper.wavefronts(entry)),
            f"{_thousands(counts['arrivals'] + elsewhere)} ({_thousands(elsewhere)})",
            *(_thousands(counts[name]) for name in ("waits", "phases")),
            counts["barriers"] + counts["cluster barriers"],
        ]


def _tensors(cases):
    for case, rows, entry in _launches(cases):
        for name, way in hopper.tensors(entry) if rows == TENSOR_ROWS else []:
            asked, device = entry["counts"][f"{name} {way} bytes"], entry["device"][f"{name} {way}"]
            yield [case, f"{name} {way}", _millions(asked), _millions(device)]


def counts(compilers, cases):
    """Of {case: {rows: [entry]}}."""
    parts = [HEAD, f"By {compilers['host']}.\n", *table(COLUMNS, _asked(cases))]
    parts += [TENSORS_HEAD, *table(TENSOR_COLUMNS, _tensors(cases))]
    return "\n".join(parts) + "\n"
