"""What the CUDA kernels ask of the machine is what bench/results/cuda-counts.json says. No GPU is needed."""

import re
import shutil
import subprocess
import sysconfig

import pytest
from compiled_kernels import compile_kernels
from counting import emulated, machine_code, measure, record, tables
from counting.cases import CASES
from counting.measure import Task

ADVICE = "If that is meant: run `make counts`, look at what changed and commit bench/results/cuda-counts.*"


def test_the_counters_count_right():
    emulated.build("counts_test")
    search = sysconfig.get_path("scripts")
    ctest = shutil.which("ctest", path=search) or shutil.which("ctest")
    command = [ctest, "--test-dir", emulated.FOLDER, "--output-on-failure", "-R", "^counts_"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"Test +#\d+: counts_\w+ \.+ +Passed", result.stdout)) == 4


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


def of_emulator(cases):
    return {
        case: {rows: [record.without_code(entry) for entry in entries] for rows, entries in sizes.items()}
        for case, sizes in cases.items()
    }


def test_the_emulator_counts_what_the_table_says(table, counted):
    """Else: run `make counts`, look at what changed and commit bench/results/cuda-counts.*, if that is meant."""
    (compilers, before), here = table, measure.compilers(None)["host"]
    assert not changes(of_emulator(before), of_emulator(counted)), f"{ADVICE}; by {compilers['host']}, here {here}"


def test_the_machine_code_is_what_the_table_says(table, counted, compilation):
    if compilation is None:
        pytest.skip("needs nvcc, cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    (compilers, before), here = table, measure.compilers(compilation)["device"]
    if compilers["device"] != here:
        pytest.skip(f"the table is of nvcc, {compilers['device']}; here is {here}")
    assert not changes(before, counted), ADVICE


def test_the_table_has_every_case(table):
    _, cases = table
    assert {case: list(sizes) for case, sizes in cases.items()} == {case: list(case.sizes) for case in CASES}


def test_both_files_tell_the_same(table):
    assert record.MARKDOWN_FILE.read_text() == tables.counts(*table)
    assert record.JSON_FILE.read_text() == record.as_text(*table)
