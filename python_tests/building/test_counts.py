"""What the CUDA kernels ask of the machine is what bench/results/cuda-counts.json says. No GPU is needed."""

import re
import shutil
import subprocess
import sysconfig

import pytest
from compiled_kernels import compile_kernels
from counting import emulated, machine_code, measure, record, requests, tables
from counting.cases import CASES, HOPPER_CASES, HOPPER_ROWS
from counting.measure import Task
from counting.walk import walk_as_counted

ADVICE = "If that is meant: run `make counts`, look at what changed and commit bench/results/*-counts.*"

MISSING = "needs nvcc, cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"


@pytest.mark.parametrize("name", ("counts", "hopper_counts"))
def test_the_counters_count_right(name):
    emulated.build(f"{name}_test")
    search = sysconfig.get_path("scripts")
    ctest = shutil.which("ctest", path=search) or shutil.which("ctest")
    command = [ctest, "--test-dir", emulated.FOLDER, "--output-on-failure", "-R", f"^{name}_"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(rf"Test +#\d+: {name}_\w+ \.+ +Passed", result.stdout)) == 4


@pytest.fixture(scope="module")
def table():
    return record.load()


@pytest.fixture(scope="module")
def compilation():
    """None where the kernels cannot be compiled, or read then."""
    try:
        machine_code.compilation()
    except machine_code.Missing:
        return None
    return compile_kernels()[0]


def test_two_ways_of_counting_agree(compilation):
    """Wavefronts by the addresses in the machine code, and by those that the emulator saw."""
    if compilation is None:
        pytest.skip(MISSING)
    case = next(case for case in CASES if case.name == "apt_forward")
    launch = emulated.Counter(emulated.build()).launches(case, case.detailed[-1])[-1]
    code = machine_code.Kernels(compilation)[launch.kernel].code
    noted = requests.Requests([])
    _, is_as_counted = walk_as_counted(code, launch, launch.busiest, noted)
    by_code = sum(request.wavefronts for warps in noted.of_step.values() for request in warps.values())
    counts = launch.counts[launch.busiest]
    by_emulator = sum(number for name, number in counts.items() if name.endswith(" wavefronts"))
    assert is_as_counted and by_code > 1000 and abs(by_code - by_emulator) <= 0.01 * by_code


@pytest.fixture(scope="module")
def counted(compilation):
    """The cases of which there are details, counted anew."""
    return measure.count([Task(case, rows) for case in CASES for rows in case.detailed], compilation)


def changes(before, after):
    return [
        f"{case}, {rows} rows: {change}"
        for case, sizes in after.items()
        for rows, entries in sizes.items()
        for change in record.differences(before[case][rows], entries)
    ]


def test_what_changed_is_told(table):
    _, cases = table
    case = CASES[0]
    rows = case.detailed[0]
    entry = cases[case][rows][0]
    barriers = entry["block"]["barriers"]
    other = {
        **entry,
        "wavefronts": entry["wavefronts"] + 5,
        "block": {**entry["block"], "barriers": barriers + 1},
    }
    assert changes({case: {rows: [entry]}}, {case: {rows: [other]}}) == [
        f"{case}, {rows} rows: {entry['kernel']}: wavefronts {entry['wavefronts']} -> {other['wavefronts']}",
        f"{case}, {rows} rows: {entry['kernel']}: block/barriers {barriers} -> {barriers + 1}",
    ]
    more = [{**entry, "kernel": "pack"}, entry]
    assert record.differences([entry], more) == [f"launches: {entry['kernel']} -> pack, {entry['kernel']}"]


def of_emulator(cases):
    return {
        case: {rows: [record.without_code(entry) for entry in entries] for rows, entries in sizes.items()}
        for case, sizes in cases.items()
    }


def test_the_emulator_counts_what_the_table_says(table, counted):
    """Else: run `make counts`, look at what changed and commit bench/results/cuda-counts.*, if that is meant."""
    (compilers, before), here = table, measure.compilers(None)["host"]
    assert not changes(of_emulator(before), of_emulator(counted)), f"{ADVICE}; by {compilers['host']}, here {here}"


def test_the_emulator_counts_what_the_hopper_path_s_table_says():
    """Else as above. All cases where a block has one tile of rows, and one where most blocks have four."""
    compilers, before = record.load(record.HOPPER_JSON_FILE, HOPPER_CASES)
    tasks = [Task(case, HOPPER_ROWS[0]) for case in HOPPER_CASES] + [Task(HOPPER_CASES[0], HOPPER_ROWS[-1])]
    here = measure.compilers(None)["host"]
    assert not changes(before, measure.count_hopper(tasks)), f"{ADVICE}; by {compilers['host']}, here {here}"


def test_the_machine_code_is_what_the_table_says(table, counted, compilation):
    if compilation is None:
        pytest.skip(MISSING)
    (compilers, before), here = table, measure.compilers(compilation)["device"]
    if compilers["device"] != here:
        pytest.skip(f"the table is of nvcc, {compilers['device']}; here is {here}")
    assert not changes(before, counted), ADVICE


def test_the_table_has_every_case(table):
    _, cases = table
    assert {case: list(sizes) for case, sizes in cases.items()} == {case: list(case.sizes) for case in CASES}


def test_the_machine_code_went_the_way_that_the_emulator_counted(table):
    _, cases = table
    entries = [(case, entry) for case, sizes in cases.items() for entries in sizes.values() for entry in entries]
    assert [f"{case}: {entry['kernel']}" for case, entry in entries if not entry["code"]["is_as_counted"]] == []


def test_both_files_tell_the_same(table):
    assert record.MARKDOWN_FILE.read_text() == tables.counts(*table)
    assert record.JSON_FILE.read_text() == record.as_text(*table)
