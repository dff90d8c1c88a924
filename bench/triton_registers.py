"""What every Triton kernel takes on four GPUs, in every tile of its table: python bench/triton_registers.py

It writes bench/results/triton-registers.json and, to be read, triton-registers.md. It needs Triton and cuobjdump, but
no GPU: kernels are compiled ahead of time, with the arguments that the ops launch them with.
"""

import argparse
import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from problems import OPS, draw
from results import RESULTS

from petl_ext.ops import triton as backend

PATH = RESULTS / "triton-registers.json"
MARKDOWN_PATH = PATH.with_suffix(".md")
FOLDER = Path(backend.__file__).parent
WIDTH, ROWS, TOKENS = 768, 4096, 197
# Of each target what one program may have of shared memory, in bytes, and threads of a warp.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Arrays and options as an op has them when everything is asked of it.
FORMS = {"apt": {}, "adapter": {"norm": True, "residual": "x", "gain": True}, "attention_pool": {"masked": 0.5}}
WEIGHT_DTYPE = torch.float32
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """One kernel as an op launches it.

    Attributes:
        op, kernel: names.
        signature: {argument: its type}, those of constants "constexpr".
        constants: {argument: value}.
        divisible: positions of arguments that are multiples of 16.
        tiles: a `petl_ext.ops.triton.tiles.Tiles`.
    """

    op: str
    kernel: str
    signature: dict
    constants: dict
    divisible: tuple
    tiles: tuple

    def key(self, target):
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        dtype = "float32" if "*bf16" not in self.signature.values() else "bfloat16"
        return f"{self.op} {self.kernel} {dtype} {constants} on {target}"


def source_hash():
    """Of the kernels and the tables of tiles, without comments: what a row of the table holds for."""
    kernels = [
        ast.dump(node)
        for path in sorted(FOLDER.glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
    ]
    tiles = ast.dump(ast.parse((FOLDER / "tiles.py").read_text(encoding="utf-8")))
    return hashlib.sha256("\n".join([*kernels, tiles]).encode()).hexdigest()[:16]


def _type_of(value):
    if torch.is_tensor(value):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _launch_of(op, kernel, arguments, constants, tiles):
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | constants
    signature = {name: "constexpr" if name in constants else _type_of(given[name]) for name in names}
    divisible = tuple(
        position
        for position, name in enumerate(names)
        if name not in constants
        and (torch.is_tensor(given[name]) or (type(given[name]) is int and given[name] % 16 == 0))
    )
    return Launch(op, kernel.__name__, signature, constants, divisible, tiles)


def launches_of(op, inner, dtype, activation=None):
    """What forward and backward of an op launch, without and with dropout; its tensors have no contents, and nothing is
    computed."""
    from petl_ext.ops.triton import adapter, apt, attention_pool, launching

    found = []

    def record(kernel, grid, *arguments, tiles, like, **constants):
        found.append(_launch_of(op.name, kernel, arguments, constants, tiles))

    sizes = (2, TOKENS, WIDTH, inner) if op.name == "attention_pool" else (ROWS, WIDTH, inner)
    problem = draw(op, *sizes, dtype=dtype, weight_dtype=WEIGHT_DTYPE, activation=activation, **FORMS[op.name])
    with ExitStack() as patches:
        for module in (adapter, apt, attention_pool, launching):
            patches.enter_context(mock.patch.object(module, "launch", record))
        CALLS[op.name](problem.to("meta"))
    return found


def _dropouts(x):
    """(dropout, seeds) of calls without it and with it."""
    return (0.0, None), (0.1, torch.empty(2, dtype=torch.int64, device=x.device))


def _call_apt(problem):
    from petl_ext.ops.triton.apt import apt_backward, apt_forward

    (x, y, *weights), activation = problem.tensors.values(), problem["activation"]
    for dropout in _dropouts(x):
        _, *saved = apt_forward(x, y, *weights, activation, True, None, *dropout)
        apt_backward(problem.dout, x, y, *weights, *saved, activation, True, True, True, True, *dropout)


def _call_adapter(problem):
    from petl_ext.ops.triton.adapter import adapter_backward, adapter_forward

    names = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias", "scale")
    weights = (*map(problem.tensors.get, names), 1.0, 1e-5, problem["activation"])
    for dropout in _dropouts(problem["x"]):
        adapter_forward(problem["x"], problem["x"], *weights, None, *dropout)
        adapter_backward(problem.dout, problem["x"], *weights, True, True, True, True, *dropout)


def _call_attention_pool(problem):
    from petl_ext.ops.triton.attention_pool import attention_pool_backward, attention_pool_forward

    given = (problem["visual"], problem["query"], problem["mask"])
    saved = attention_pool_forward(*given, problem["scale"])
    attention_pool_backward(problem.dout, *given, *saved, problem["scale"], True, True)


CALLS = {"apt": _call_apt, "adapter": _call_adapter, "attention_pool": _call_attention_pool}


def every_launch(target):
    """Of every entry of the tables of tiles, each once, as `Launch`es."""
    # What the ops ask to know AMD's from NVIDIA's.
    with mock.patch.object(torch.version, "hip", None if target.startswith("sm_") else "7.0"):
        return _every_launch()


def _every_launch():
    from petl_ext.ops.triton.tiles import POOL_TILES, ROW_TILES

    found = {}
    for op in OPS.values():
        for inner in POOL_TILES if op.name == "attention_pool" else ROW_TILES:
            for dtype in (torch.bfloat16, torch.float32):
                for activation in op.activations if inner == 64 else op.activations[:1]:
                    for launch in launches_of(op, inner, dtype, activation):
                        found.setdefault(launch.key("")[len(op.name) :], launch)
    return list(found.values())


def _compile(launch, target):
    """{"registers", "spilled", "shared", "tensor_cores"} of a kernel: those of a thread, in bytes and instructions."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(importlib.import_module(f"petl_ext.ops.triton.{_module_of(launch)}"), launch.kernel)
    is_cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if is_cuda else GPUTarget("hip", target, 64)
    names = list(launch.signature)
    source = ASTSource(
        fn=kernel,
        signature=launch.signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.divisible},
    )
    compiled = compile(source, target=gpu, options={"num_warps": launch.tiles.warps, "num_stages": launch.tiles.stages})
    use = _of_cubin(compiled.asm["cubin"]) if is_cuda else _of_amdgcn(compiled.asm["amdgcn"])
    return {**use, "shared": compiled.metadata.shared}


def _module_of(launch):
    return "products" if launch.kernel in ("weight_gradient", "column_sums") else launch.op


def _of_cubin(code):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [_disassembler(), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups())
    return {"registers": registers, "spilled": stack + local}


def _of_amdgcn(text):
    registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": registers, "spilled": 4 * spilled}


def _disassembler():
    packaged = [path for entry in sys.path if entry for path in Path(entry).glob("nvidia/cu*/bin/cuobjdump")]
    for candidate in [*packaged, shutil.which("cuobjdump")]:
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    raise SystemExit("triton_registers: needs cuobjdump: pip install nvidia-cuda-cuobjdump")


def _row(launch_and_target):
    launch, target = launch_and_target
    return launch.key(target), _compile(launch, target)


def every_row(workers):
    """{key: what `_compile` says}, in order; flaws are told as they are found."""
    rows = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for key, row in pool.map(_row, _tasks()):
            rows[key] = row
            for flaw in flaws_of({key: row}):
                print(flaw, flush=True)
    return dict(sorted(rows.items()))


def flaws_of(rows):
    """What of a table must not be, in words."""
    for key, row in rows.items():
        limit = SHARED_MEMORY[key.rpartition(" ")[2]]
        if row["spilled"]:
            yield f"{key}: {row['spilled']} bytes spilled"
        if row["shared"] > limit:
            yield f"{key}: {row['shared']} bytes of shared memory, there are {limit}"


def sample(every=29):
    """The rows of some kernels, others of each target."""
    return dict(map(_row, _tasks()[::every]))


def _tasks():
    return [(launch, target) for target in SHARED_MEMORY for launch in every_launch(target)]


def markdown(table):
    """A row for each kernel, a column for each target."""
    found = {}
    for key, row in table["kernels"].items():
        kernel, _, target = key.rpartition(" on ")
        found.setdefault(kernel, dict.fromkeys(SHARED_MEMORY, ""))[target] = _in_words(row)
    lines = [
        f"By Triton {table['triton']}: registers of a thread, shared memory of a program, and what is spilled.\n",
        f"| op | kernel | dtype | constants | {' | '.join(SHARED_MEMORY)} |",
        f"|---|---|---|---|{'---|' * len(SHARED_MEMORY)}",
    ]
    for kernel, cells in found.items():
        op, name, dtype, *constants = kernel.split(" ")
        lines.append(f"| {op} | `{name}` | {dtype} | {' '.join(constants)} | {' | '.join(cells.values())} |")
    return "\n".join(lines) + "\n"


def _in_words(row):
    spilled = f", {row['spilled']} B spilled" if row["spilled"] else ""
    return f"{row['registers']}, {row['shared'] / 1024:.3g} KiB{spilled}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET must not be set: what is interpreted cannot be compiled")
    rows = every_row(workers)
    table = {"triton": triton_version(), "source": source_hash(), "kernels": rows}
    PATH.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    MARKDOWN_PATH.write_text(markdown(table), encoding="utf-8")
    print(f"{PATH.name}: {len(rows)} kernels")


def triton_version():
    import triton

    return triton.__version__


if __name__ == "__main__":
    main()
