"""Counts as Markdown."""

from counting.analysis import PRODUCTS, blocks_of

HEAD = """# What the CUDA kernels ask of the machine

Counted without a GPU; nothing here is a measurement. csrc/README.md says how, under "Counts".
"""
BOUNDS_HEAD = """
## Bounds

Microseconds that a launch takes at least on an H200, whatever overlaps with what: device memory at 4.3 TB/s, each
launch reading its tensors anew; the way from the second-level cache (L2) at 5.5 TB/s; shared memory at one wavefront
per clock; tensor cores at 62 % of their peak, which `mma.sync` reaches; the sum of stall counts of the warp that has
most, times waves of blocks; 132 multiprocessors at 1.755 GHz. The speeds are leads, no measurements of ours.
"""
BLOCKS_HEAD = """
## A block

Of the block that asks for most, at the rows that are named. Products are 16 x 8 x 16; in parentheses how many more
are issued but switched off. Wanted are those that have a term other than zero, as counted at the smallest number of
rows. Stall counts and instructions are of the warp that has most. "L2" is what comes from the second-level cache.
"""
LOOPS_HEAD = """
## Loops

A round of each loop, loops inside of it included, of the warp that has most stall counts; in parentheses products that
are switched off.
"""
TENSORS_HEAD = """
## Tensors

Of the block that asks for most: kilobytes that its requests use, that their sectors of 32 bytes hold, and that come
from the second-level cache.
"""


def table(head, rows):
    """Lines; the first two columns hold words, the others numbers."""
    alignment = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join(alignment)}|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def _kilobytes(number):
    return f"{number / 1000:.1f}"


def _entries(cases):
    for case, sizes in cases.items():
        for rows, entries in sizes.items():
            yield from ((case, rows, entry) for entry in entries)


def _detailed(cases):
    """For each case the entries of the most rows of which there are details."""
    for case, sizes in cases.items():
        rows = max((rows for rows in sizes if rows in case.detailed), default=None)
        yield from ((case, rows, entry) for entry in sizes.get(rows, []))


def _bounds(cases):
    for case, rows, entry in _entries(cases):
        times = entry["bounds"]
        largest = max(times, key=times.get)
        cells = [f"{times[name] / 1000:.1f}" if name in times else "-" for name in BOUNDS]
        cells = [f"**{cell}**" if name == largest else cell for name, cell in zip(BOUNDS, cells, strict=True)]
        yield [case, f"`{entry['kernel']}`", rows, blocks_of(entry), *cells, largest]


def _blocks(cases):
    for case, rows, entry in _detailed(cases):
        code, block = entry["code"], entry["block"]
        dead = f" ({code['dead_products']})" if code and code["dead_products"] else ""
        of_code = ["-"] * 3
        if code:
            of_code = [code["registers"], code["resident_blocks"], f"{code['stall']} ({code['instructions']})"]
        yield [
            case,
            f"`{entry['kernel']}`",
            rows,
            entry["threads"],
            _kilobytes(entry["shared_bytes"]),
            *of_code,
            f"{sum(block.get(name, 0) for name in PRODUCTS)}{dead}",
            _wanted(cases[case], entry["kernel"]),
            f"{_in_block(block, 'wavefronts')} / {_in_block(block, 'least')}",
            _kilobytes(32 * sum(number for name, number in block.items() if name.endswith(" L2"))),
            block.get("barriers", 0),
        ]


def _wanted(sizes, kernel):
    """Of a block of the same kernel where all blocks were counted."""
    entries = (entry for entries in sizes.values() for entry in entries if entry["kernel"] == kernel)
    return next((entry["block"].get("products wanted", 0) for entry in entries if "products_wanted" in entry), "-")


def _in_block(block, what):
    return sum(number for name, number in block.items() if name.startswith("shared ") and name.endswith(f" {what}"))


def _loops(cases):
    for case, _, entry in _detailed(cases):
        for loop in entry["code"]["loops"] if entry["code"] else []:
            rounds = loop["rounds"]
            dead = f" ({loop['dead_products'] / rounds:.1f})" if loop["dead_products"] else ""
            yield [
                case,
                f"`{entry['kernel']}`",
                f"{loop['at']:#x}",
                rounds,
                *(f"{loop[name] / rounds:.1f}" for name in ("instructions", "stall")),
                f"{loop['products'] / rounds:.1f}{dead}",
                f"{loop['matrices'] / rounds:.1f}",
            ]


def _tensors(cases):
    for case, _, entry in _detailed(cases):
        block = entry["block"]
        for name in [name.removesuffix(" sectors") for name in block if name.endswith(" sectors")]:
            from_cache = _kilobytes(32 * block[f"{name} L2"]) if f"{name} L2" in block else "-"
            used, held = block[f"{name} bytes"], 32 * block[f"{name} sectors"]
            yield [case, f"`{entry['kernel']}`", name, _kilobytes(used), _kilobytes(held), from_cache]


BOUNDS = ("device memory", "second-level cache", "shared memory", "tensor cores", "stall counts")
BOUND_COLUMNS = ("case", "kernel", "rows", "blocks", *BOUNDS, "largest")
BLOCK_COLUMNS = (
    *("case", "kernel", "rows", "threads", "shared kB", "registers", "a multiprocessor", "stall counts (instructions)"),
    *("products", "wanted", "wavefronts / least", "L2 kB", "barriers"),
)
LOOP_COLUMNS = ("case", "kernel", "at", "rounds", "instructions", "stall counts", "HMMA", "LDSM")
TENSOR_COLUMNS = ("case", "kernel", "tensor", "used", "in sectors", "from L2")


def counts(compilers, cases):
    """Of {case: {rows: [entry]}}."""
    parts = [HEAD, f"By {compilers['host']}; by nvcc, {compilers['device'] or 'none'}.\n"]
    for head, columns, rows in (
        (BOUNDS_HEAD, BOUND_COLUMNS, _bounds),
        (BLOCKS_HEAD, BLOCK_COLUMNS, _blocks),
        (LOOPS_HEAD, LOOP_COLUMNS, _loops),
        (TENSORS_HEAD, TENSOR_COLUMNS, _tensors),
    ):
        parts += [head, *table(columns, list(rows(cases)))]
    return "\n".join(parts) + "\n"


def modeled(cases):
    """Of {case: {rows: {machine: [nanoseconds]}}}."""
    rows = []
    for case, sizes in cases.items():
        for number, times in sizes.items():
            spans = [
                f"{fast / 1000:.1f}-{slow / 1000:.1f}" for fast, slow in zip(times["fast"], times["slow"], strict=True)
            ]
            total = f"{sum(times['fast']) / 1000:.1f}-{sum(times['slow']) / 1000:.1f}"
            rows.append([case, number, total, " + ".join(spans)])
    words = "Modeled microseconds of a call, fast to slow, and of its launches. NO GPU HAS CALIBRATED THIS MODEL."
    return "\n".join([words, *table(["case", "rows", "call", "launches"], rows)]) + "\n"
