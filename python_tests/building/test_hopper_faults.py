"""One fault at a time is planted into the Hopper path's kernels; the emulator must show each in one of its modes.

csrc/tests/faults/hopper.cpp runs the kernels and says in which modes something is wrong.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = "kernels/cuda"
SANDWICH, LAYOUT, PTX = "hopper_sandwich.h", "hopper_layout.h", "hopper_ptx.h"
APT, PACKING = "apt_hopper_forward.h", "hopper_packing.h"
EMULATOR = ["block", "barriers", "bulk_copies", "group_products", "warp", "launch", "settings", "runtime"]
COMPILER = (os.environ.get("CXX") or "c++").split()[0]
FLAGS = ["-std=c++17", "-w", "-fno-strict-aliasing"]


class Fault(NamedTuple):
    """Of a text of a file its occurrence `number` becomes another text; spaces and line ends do not matter."""

    file: str
    old: str
    new: str
    number: int = 0


WAIT, COMMIT = "wait(&full_[at.stage], at.parity);", "commit_products();"
EXPECT = "arrive_and_expect(&full_[at.stage], copies_rows ? Its::kBytes : Its::kWeightsBytes);"
HIDDEN = "hidden[i / 4][i % 4] ="
FAULTS = {
    "first product does not wait for its stage": Fault(SANDWICH, WAIT, ""),
    "second product does not wait for its stage": Fault(SANDWICH, WAIT, "", 1),
    "producer does not wait for a free stage": Fault(SANDWICH, "wait(&empty_[at.stage], at.parity ^ 1);", ""),
    "producer waits for the wrong parity": Fault(SANDWICH, "at.parity ^ 1", "at.parity"),
    "consumer waits for the wrong parity": Fault(SANDWICH, WAIT, "wait(&full_[at.stage], at.parity ^ 1);"),
    "parity never flips": Fault(SANDWICH, "parity ^= 1;", ""),
    "no bytes are announced": Fault(SANDWICH, EXPECT, "arrive(&full_[at.stage]);"),
    "bytes of the rows alone are announced": Fault(
        SANDWICH, EXPECT, "arrive_and_expect(&full_[at.stage], Its::kRowsBytes);"
    ),
    "too many bytes are announced": Fault(SANDWICH, EXPECT, "arrive_and_expect(&full_[at.stage], Its::kBytes + 16);"),
    "x described with a swizzle of 64 bytes": Fault(
        SANDWICH, "describe_tile(rows(at.stage, group()), kRowBytes)", "describe_tile(rows(at.stage, group()), 64)"
    ),
    "step of eight rows halved": Fault(PTX, "uint64_t{row_bytes * 8 >> 4} << 32", "uint64_t{row_bytes * 4 >> 4} << 32"),
    "tiles described without a swizzle": Fault(PTX, "kind << 62", "uint64_t{kind * 0} << 62"),
    "step in depth doubled": Fault(
        SANDWICH, "left + step * 32 / 16, right + step * 32 / 16", "left + step * 64 / 16, right + step * 64 / 16"
    ),
    "packed without a swizzle": Fault(
        LAYOUT,
        "static_cast<int>(swizzled(static_cast<uint32_t>(element) * 2, static_cast<uint32_t>(columns) * 2) / 2)",
        "element + 0 * columns",
    ),
    "last piece as wide as its neighbor": Fault(LAYOUT, "Piece{half, 16}", "Piece{half, 32}"),
    "prompts packed in their order": Fault(PACKING, "const int unit = unit_of(inner,", "const int unit = (0,"),
    "rows of y read without a swizzle": Fault(
        SANDWICH,
        "tile + swizzled(lane % 16 * kRowBytes + block * 32 + lane / 16 * 16, kRowBytes)",
        "tile + lane % 16 * kRowBytes + block * 32 + lane / 16 * 16",
    ),
    "no fence.proxy.async": Fault(SANDWICH, "show_writes();", ""),
    "no __syncwarp before the store": Fault(SANDWICH, "show_writes(); __syncwarp();", "show_writes();"),
    "no wgmma.fence before the first product": Fault(SANDWICH, "fence_products(sums);", ""),
    "no wgmma.fence before the second product": Fault(SANDWICH, "fence_products(sums);", "", 1),
    "no commit_group": Fault(SANDWICH, COMMIT, ""),
    "first product is not waited for": Fault(SANDWICH, "wait_for_products<0>(sums);", ""),
    "second product is not waited for": Fault(SANDWICH, "wait_for_products<0>(sums);", "", 1),
    "stage released while its products are under way": Fault(
        SANDWICH, "if (chunk > 0) release(last);", "release(at.stage);"
    ),
    "two groups left under way": Fault(SANDWICH, "wait_for_products<1>(sums);", "wait_for_products<2>(sums);"),
    "last stage never released": Fault(
        SANDWICH, "wait_for_products<0>(sums); release(last);", "wait_for_products<0>(sums);"
    ),
    "stage released before the store has read it": Fault(SANDWICH, "wait_for_reads<1>();", ""),
    "last store is not waited for": Fault(SANDWICH, "if (lane == 0) wait_for_reads<0>();", ""),
    "rows of the left operand exchanged": Fault(APT, HIDDEN, "hidden[i / 4][i % 4 ^ 1] ="),
    "halves of its depth exchanged": Fault(APT, HIDDEN, "hidden[i / 4][i % 4 ^ 2] ="),
    "another warp's tile": Fault(
        SANDWICH, "warp() % 4 * kWarpRows * kRowBytes", "(warp() + 1) % 4 * kWarpRows * kRowBytes"
    ),
    "too few arrivals expected": Fault(SANDWICH, "kConsumerWarps * kCluster);", "kConsumerWarps * kCluster - 1);"),
    "second product's sums never cleared": Fault(
        SANDWICH, "right + (step * 16 - piece.first) * 2 / 16, step)", "right + (step * 16 - piece.first) * 2 / 16, 1)"
    ),
    "y read before its stage is full": Fault(
        SANDWICH,
        f"{WAIT} float sums[kHopperChunk / 2];",
        "add_rows(*reinterpret_cast<const float(*)[32]>(&hidden[0][0]), rows_of_warp(at.stage), column, terms);"
        f"{WAIT} float sums[kHopperChunk / 2];",
    ),
    "sums touched while under way": Fault(SANDWICH, COMMIT, "sums[3] += 1; commit_products();"),
    "registers that nobody gives up": Fault(SANDWICH, "give_up_registers<kProducerRegisters>();", ""),
    "gate stored for rows that there are not": Fault(APT, "if (row >= R) continue;", "if (row > R) continue;"),
    "cluster: the other block's warps are not awaited": Fault(
        SANDWICH, "kConsumerWarps * kCluster);", "kConsumerWarps);"
    ),
    "cluster: released at home alone": Fault(
        SANDWICH, "arrive_at(&empty_[stage], rank);", "arrive_at(&empty_[stage], rank_in_cluster());"
    ),
    "cluster: no barrier at the beginning": Fault(SANDWICH, "synchronize_cluster(); } else", "__syncthreads(); } else"),
    "cluster: no barrier at the end": Fault(SANDWICH, "if (kCluster > 1) synchronize_cluster(); }", "}"),
    "cluster: shares at the same place": Fault(
        SANDWICH, "weights(stage) + offset, tile + offset", "weights(stage), tile + offset"
    ),
    "cluster: not multicast": Fault(SANDWICH, "(1 << kCluster) - 1, weights", "1 << rank_in_cluster(), weights"),
}


def compiled(*arguments):
    result = subprocess.run([COMPILER, *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What no fault changes."""
    folder = tmp_path_factory.mktemp("objects")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'emulator'}"]
    sources = [ROOT / "csrc" / "emulator" / f"{name}.cpp" for name in EMULATOR]
    sources += [ROOT / "csrc" / KERNELS / f"{name}.cu" for name in ("launch", "launch_hopper", "hopper_choice")]
    for source in sources:
        compiled("-O2", *includes, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}_{source.suffix[1:]}.o")
    return sorted(folder.glob("*.o"))


def planted(fault):
    """The file's text with the fault."""
    text = (ROOT / "csrc" / KERNELS / fault.file).read_text(encoding="utf-8")
    pattern = r"\s+".join(map(re.escape, fault.old.split()))
    matches = list(re.finditer(pattern, text))
    assert len(matches) > fault.number, f"{fault.file} must hold {fault.old!r}"
    match = matches[fault.number]
    return text[: match.start()] + fault.new + text[match.end() :]


def what_is_wrong(folder, objects, fault=None):
    """What the program prints; a folder before the sources' own holds the faulty file."""
    (folder / KERNELS).mkdir(parents=True)
    if fault:
        (folder / KERNELS / fault.file).write_text(planted(fault), encoding="utf-8")
    csrc = ROOT / "csrc"
    includes = [f"-I{path}" for path in (folder, csrc, csrc / "emulator", csrc / "tests")]
    program = folder / "program"
    compiled("-O0", *includes, csrc / "tests/faults/hopper.cpp", *objects, "-o", program, "-pthread", "-ldl")
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    return result.stdout if result.returncode == 0 else f"{result.stdout}ends with {result.returncode}"


def test_nothing_is_wrong_without_a_fault(tmp_path, objects):
    assert what_is_wrong(tmp_path, objects) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(name, tmp_path, objects):
    assert "wrong in" in what_is_wrong(tmp_path, objects, FAULTS[name])
