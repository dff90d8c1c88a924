"""The Triton kernels as they are compiled: the table in bench/results is of them, and no entry spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_registers

BENCH = Path(triton_registers.__file__).parent
TABLE = json.loads(triton_registers.PATH.read_text(encoding="utf-8"))


def test_the_table_is_of_these_kernels():
    said = "the Triton kernels have changed: run python bench/triton_registers.py"
    assert TABLE["source"] == triton_registers.source_hash(), said


def test_every_entry_of_the_tables_of_tiles_is_compiled_for_every_target():
    from petl_ext.ops.triton.tiles import POOL_TILES, ROW_TILES

    for target in triton_registers.SHARED_MEMORY:
        for op, sizes, name in (
            ("apt", ROW_TILES, "PP"),
            ("adapter", ROW_TILES, "BB"),
            ("attention_pool", POOL_TILES, "HH"),
        ):
            for size in sizes:
                for dtype in ("bfloat16", "float32"):
                    found = [
                        key
                        for key in TABLE["kernels"]
                        if key.startswith(f"{op} ")
                        and f" {dtype} {name}={size} " in key
                        and key.endswith(f" on {target}")
                    ]
                    assert len(found) >= 2, (op, size, dtype, target)


def test_nothing_spills_and_shared_memory_suffices():
    assert list(triton_registers.flaws_of(TABLE["kernels"])) == []


@pytest.mark.parametrize(
    ("change", "said"), [({"spilled": 8}, "8 bytes spilled"), ({"shared": 1 << 20}, "bytes of shared")]
)
def test_a_flaw_is_seen(change, said):
    key = next(iter(TABLE["kernels"]))
    (flaw,) = triton_registers.flaws_of({key: {**TABLE["kernels"][key], **change}})
    assert key in flaw and said in flaw


def test_some_entries_are_compiled_again():
    """In a process of its own, in which nothing is interpreted."""
    code = "import json, triton_registers as t; print(json.dumps(t.sample()))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], cwd=BENCH, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    assert len(rows) > 8 and list(triton_registers.flaws_of(rows)) == []
    if triton_registers.triton_version() == TABLE["triton"]:
        assert rows == {key: TABLE["kernels"][key] for key in rows}
