"""What bench/hopper_model.py takes the Hopper path's kernels to ask for is what bench/results/hopper-counts.json says.
test_counts.py counts anew.
"""

from typing import NamedTuple

import hopper_model
import pytest
from counting import hopper, hopper_tables, record
from counting.cases import HOPPER_CASES, HOPPER_ROWS


class Call(NamedTuple):
    entry: dict
    kernel: tuple
    rows: int
    asked: tuple


CONSUMER_WARPS = 8
MODELED = {kernel.case: kernel for kernel in hopper_model.kernels()}
CALLS = [(case, rows) for case in HOPPER_CASES for rows in HOPPER_ROWS]


@pytest.fixture(scope="module")
def table():
    return record.load(record.HOPPER_JSON_FILE, HOPPER_CASES)


def test_both_files_tell_the_same(table):
    _, cases = table
    assert {case: tuple(sizes) for case, sizes in cases.items()} == dict.fromkeys(HOPPER_CASES, HOPPER_ROWS)
    assert record.HOPPER_JSON_FILE.read_text() == record.as_text(*table)
    assert record.HOPPER_MARKDOWN_FILE.read_text() == hopper_tables.counts(*table)


@pytest.fixture(params=CALLS, ids=lambda call: f"{call[0]}, {call[1]} rows")
def call(request, table):
    """What was counted of the kernel itself, the last launch, and what the model says that it asks for."""
    case, rows = request.param
    kernel = MODELED[str(case)]
    return Call(table[1][case][rows][-1], kernel, rows, hopper_model.asked(kernel, rows))


def tiles_of(call):
    return -(-call.rows // hopper_model.ROWS)


def turns_of(call):
    """The blocks of a cluster take as many, even with no tile left for one."""
    cluster = call.kernel.cluster
    return -(-tiles_of(call) // cluster) * cluster


def test_products_are_the_model_s(call):
    """All are wanted but those of a turn with no rows left: among eight columns some are always prompts or units."""
    products, wanted = (call.entry["counts"][f"group products{which}"] for which in ("", " wanted"))
    assert products * hopper.OF_PRODUCT == call.asked.products
    of_rows = products * tiles_of(call) // turns_of(call)
    assert wanted == products if of_rows == products else of_rows <= wanted < products


def test_bytes_of_the_rows_are_the_model_s(call):
    """As requests ask for them; and of device memory, where what is read again comes from the cache."""
    entry, asked = call.entry, call.asked
    assert hopper.of_rows(entry, "read", of="counts") == asked.copied + asked.again + asked.read
    assert hopper.of_rows(entry, "write", of="counts") == asked.written
    assert hopper.of_rows(entry, "read") == asked.copied + asked.read
    assert hopper.of_rows(entry, "write") == asked.written


def test_bytes_of_the_ring_are_the_model_s(call):
    """Weights are read once for a cluster, and come to all its blocks; zeros come to one with no rows left."""
    asked, cluster = call.asked, call.kernel.cluster
    assert call.entry["counts"]["packed read bytes"] == asked.weights
    rows = (asked.copied + asked.again) * turns_of(call) // tiles_of(call)
    assert call.entry["counts"]["shared bulk copy bytes"] == rows + cluster * asked.weights


def test_what_the_model_leaves_out(call):
    """Of device memory: weights, which the cache keeps after the first copy, as it is to keep the room of the adapter's
    backward; and of a row its gate, statistics or share of a sum.
    """
    device, kernel = call.entry["device"], call.kernel
    beside = {name: number for name, number in device.items() if name.split()[0] in hopper.BESIDE_ROWS}
    chunks = hopper_model.WIDTH // hopper_model.CHUNK
    assert beside.pop("packed read") == len(kernel.products) * chunks * kernel.weights
    if kernel.case.startswith("adapter backward"):
        room = 4 * call.entry["grid"][0] * hopper_model.ROWS * kernel.inner
        assert beside.pop("room write") == room and 0 < beside.pop("room read") - room < 10_000
    assert sum(beside.values()) < 16 * call.rows + 10_000


def test_no_thread_meets_another_s_bank(call):
    counts = call.entry["counts"]
    needed = {name: number for name, number in counts.items() if name.endswith(" wavefronts")}
    assert needed == {name: counts[name.replace(" wavefronts", " least")] for name in needed} and needed


def test_barriers_of_the_ring(call):
    """Of a stage's two, `full` has the producer's arrival, and `empty` those of all consumer warps in the cluster."""
    counts, cluster = call.entry["counts"], call.kernel.cluster
    steps = turns_of(call) * hopper_model.WIDTH // hopper_model.CHUNK * len(call.kernel.products)
    assert counts["phases"] == 2 * steps
    assert counts["arrivals"] == (1 + CONSUMER_WARPS) * steps
    assert counts.get("arrivals at another block", 0) == (cluster - 1) * CONSUMER_WARPS * steps
