"""The model of the Hopper path's kernels: what it is made of, and that its committed table is what it says."""

import hopper_model
import pytest
from hopper_model import CHUNK, MACHINES, ROWS, WIDTH, Simulation, floor, keeps_rows, kernels, stalls_told
from results import RESULTS

NAMED = {kernel.case: kernel for kernel in kernels()}


def test_bytes_of_a_backward():
    """dout, y, dx and dy, and of the kept scores three matrices, each once."""
    kernel = NAMED["apt backward 200 bfloat16"]
    of_rows = 15360 * (4 * WIDTH + 3 * 200) * 2
    assert floor(kernel, 15360) == pytest.approx(of_rows / 4.3e12 * 1e6)


@pytest.mark.parametrize("kernel", NAMED.values(), ids=lambda kernel: kernel.case)
def test_one_tile_takes_its_steps(kernel):
    """A block alone: never faster than its warps issue, and far from a launch's other bounds."""
    stalls = stalls_told()[kernel.name, kernel.inner]
    machine = MACHINES["slow"]
    cycles = (Simulation(kernel, stalls, ROWS, machine, True).run() - machine.launch) * machine.clock / 1e6
    least = stalls.between + WIDTH // CHUNK * (stalls.first + stalls.second)
    assert least < cycles < 4 * least + 20_000


def test_rows_that_the_cache_holds():
    kernel = NAMED["adapter forward 96 bfloat16"]
    assert keeps_rows(kernel, 15360) and not keeps_rows(kernel, 61440)


def test_the_table_is_what_the_model_says():
    told = (RESULTS / "hopper-model.md").read_text().splitlines()
    assert list(hopper_model.lines()) == told[-len(NAMED) * len(hopper_model.SIZES) - 2 :]


def test_the_goals_of_the_rows_of_backward():
    """No GPU has said so."""
    (row,) = (
        line
        for line in (RESULTS / "hopper-model.md").read_text().splitlines()
        if "apt backward 200" in line and "15360" in line
    )
    fast, slow = map(float, row.split("|")[6].split("-"))
    assert fast < slow <= 34
