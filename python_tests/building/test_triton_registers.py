"""The Triton kernels as they are compiled: the table in bench/results is of them, and no entry spills."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_registers

BENCH = Path(triton_registers.__file__).parent
TABLE = json.loads(triton_registers.PATH.read_text(encoding="utf-8"))
RENEW = "the Triton kernels have changed: run python bench/triton_registers.py"


def launched_kernels():
    """Of each call of `launch` in the source of the ops the name of the kernel."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in triton_registers.FOLDER.glob("*.py"))
    return {
        node.args[0].id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch"
    }


def test_the_table_is_of_these_kernels():
    assert TABLE["source"] == triton_registers.source_hash(), RENEW
    assert triton_registers.MARKDOWN_PATH.read_text(encoding="utf-8") == triton_registers.markdown(TABLE), RENEW


@pytest.mark.parametrize("target", triton_registers.SHARED_MEMORY)
def test_every_kernel_is_compiled_in_every_tile_of_its_table(target):
    launches = triton_registers.every_launch(target)
    assert {launch.kernel for launch in launches} == launched_kernels()
    assert {launch.key(target) for launch in launches} == {key for key in TABLE["kernels"] if key.endswith(target)}
    for op, inner, sizes in (
        ("apt", "PP", {64, 128, 256, 512}),
        ("adapter", "BB", {64, 128, 256, 512}),
        ("attention_pool", "HH", {32, 64}),
    ):
        found = {
            (launch.constants[inner], "*bf16" in launch.signature.values())
            for launch in launches
            if launch.op == op and inner in launch.constants
        }
        assert found == {(size, is_narrow) for size in sizes for is_narrow in (False, True)}


def test_nothing_spills_and_shared_memory_suffices():
    assert list(triton_registers.flaws_of(TABLE["kernels"])) == []


@pytest.mark.parametrize(
    ("change", "said"), [({"spilled": 8}, "8 bytes spilled"), ({"shared": 1 << 20}, "bytes of shared")]
)
def test_a_flaw_is_seen(change, said):
    key = next(iter(TABLE["kernels"]))
    (flaw,) = triton_registers.flaws_of({key: {**TABLE["kernels"][key], **change}})
    assert key in flaw and said in flaw


def test_some_entries_are_compiled_again(tmp_path):
    """In a process of its own, in which nothing is interpreted."""
    code = "import json, triton_registers as t; print(json.dumps([t.triton_version(), t.sample()]))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, "-c", code], cwd=BENCH, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, rows = json.loads(result.stdout.splitlines()[-1])
    assert {key.rpartition(" ")[2] for key in rows} == triton_registers.SHARED_MEMORY.keys()
    assert list(triton_registers.flaws_of(rows)) == []
    if version == TABLE["triton"]:
        assert rows == {key: TABLE["kernels"][key] for key in rows}
