"""One fault at a time is planted into the Hopper path's kernels; the emulator must show each in one of its modes.

The programs csrc/tests/faults/hopper*.cpp run the kernels and say in which modes something is wrong.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = "kernels/cuda"
SANDWICH, RING, ROWS, LAYOUT, PTX = (f"hopper_{name}.h" for name in ("sandwich", "ring", "rows", "layout", "ptx"))
APT, PACKING, NEIGHBORS = "apt_hopper_forward.h", "hopper_packing.h", "hopper_neighbors.h"
APT_BACKWARD, ADAPTER, ADAPTER_BACKWARD = (
    "apt_hopper_backward.h",
    "adapter_hopper_forward.h",
    "adapter_hopper_backward.h",
)
EMULATOR = ["block", "barriers", "bulk_copies", "group_products", "warp", "launch", "settings", "runtime"]
COMPILER = (os.environ.get("CXX") or "c++").split()[0]
FLAGS = ["-std=c++17", "-w", "-fno-strict-aliasing"]


class Fault(NamedTuple):
    """Of a text of a file its occurrence `number` becomes another text; spaces and line ends do not matter."""

    file: str
    old: str
    new: str
    number: int = 0


WAIT, COMMIT = "ring_.wait_for(at);", "commit_products();"
EXPECT = "arrive_and_expect(&full_[at.stage], tiles * Its::kTileBytes + Its::kWeightsBytes);"
HIDDEN = "hidden[i / 4][i % 4] ="
# Of the skeleton, which prompt diffusion's forward shows.
FAULTS = {
    "first product does not wait for its stage": Fault(SANDWICH, WAIT, ""),
    "second product does not wait for its stage": Fault(SANDWICH, WAIT, "", 1),
    "producer does not wait for a free stage": Fault(RING, "wait(&empty_[at.stage], at.parity ^ 1);", ""),
    "producer waits for the wrong parity": Fault(RING, "at.parity ^ 1", "at.parity"),
    "consumer waits for the wrong parity": Fault(
        RING, "wait(&full_[at.stage], at.parity);", "wait(&full_[at.stage], at.parity ^ 1);"
    ),
    "parity never flips": Fault(RING, "parity ^= 1;", ""),
    "no bytes are announced": Fault(RING, EXPECT, "arrive(&full_[at.stage]);"),
    "bytes of the rows alone are announced": Fault(
        RING, EXPECT, "arrive_and_expect(&full_[at.stage], tiles * Its::kTileBytes);"
    ),
    "too many bytes are announced": Fault(RING, EXPECT, EXPECT.replace(");", " + 16);")),
    "x described with a swizzle of 64 bytes": Fault(
        SANDWICH,
        "describe_tile(ring_.rows(at.stage, 0, warp() / 4), kRowBytes)",
        "describe_tile(ring_.rows(at.stage, 0, warp() / 4), 64)",
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
    "tiles of weights all the same": Fault(SANDWICH, "weights += Ring::Its::kWeightsBytes;", ""),
    "rows of y read without a swizzle": Fault(
        ROWS,
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
        SANDWICH,
        "if (chunk > 0) ring_.template release<Watch::kReads>(last);",
        "ring_.template release<Watch::kReads>(at.stage);",
    ),
    "two groups left under way": Fault(SANDWICH, "wait_for_products<1>(sums);", "wait_for_products<2>(sums);"),
    "last stage never released": Fault(
        SANDWICH,
        "wait_for_products<0>(sums); ring_.template release<Watch::kReads>(last);",
        "wait_for_products<0>(sums);",
    ),
    "stage released before the store has read it": Fault(SANDWICH, "wait_for_reads<1>();", ""),
    "last store is not waited for": Fault(SANDWICH, "if (lane == 0) wait_for_reads<0>();", ""),
    "rows of the left operand exchanged": Fault(APT, HIDDEN, "hidden[i / 4][i % 4 ^ 1] ="),
    "halves of its depth exchanged": Fault(APT, HIDDEN, "hidden[i / 4][i % 4 ^ 2] ="),
    "another warp's tile": Fault(RING, "warp % 4 * kWarpRows * kRowBytes", "(warp + 1) % 4 * kWarpRows * kRowBytes"),
    "too few arrivals expected": Fault(RING, "kConsumerWarps * kCluster);", "kConsumerWarps * kCluster - 1);"),
    "second product's sums never cleared": Fault(
        SANDWICH, "right + (step * 16 - piece.first) * 2 / 16, step)", "right + (step * 16 - piece.first) * 2 / 16, 1)"
    ),
    "y read before its stage is full": Fault(
        SANDWICH,
        f"{WAIT} float sums[kHopperChunk / 2];",
        "add_rows(*reinterpret_cast<const float(*)[32]>(&hidden[0][0]), at.stage, column, terms);"
        f"{WAIT} float sums[kHopperChunk / 2];",
    ),
    "sums touched while under way": Fault(SANDWICH, COMMIT, "sums[3] += 1; commit_products();"),
    "registers that nobody gives up": Fault(SANDWICH, "give_up_registers<kProducerRegisters>();", ""),
    "gate stored for rows that there are not": Fault(
        APT, "if (!rows.has_line(line)) continue;", "if (rows.line(line) > rows.R) continue;"
    ),
    "cluster: the other block's warps are not awaited": Fault(RING, "kConsumerWarps * kCluster);", "kConsumerWarps);"),
    "cluster: released at home alone": Fault(
        RING, "arrive_at(&empty_[stage], rank);", "arrive_at(&empty_[stage], rank_in_cluster());"
    ),
    "cluster: no barrier at the beginning": Fault(RING, "synchronize_cluster(); } else", "__syncthreads(); } else"),
    "cluster: no barrier at the end": Fault(RING, "if (kCluster > 1) synchronize_cluster(); }", "}"),
    "cluster: shares at the same place": Fault(
        RING, "weights(at.stage) + offset, tile + offset", "weights(at.stage), tile + offset"
    ),
    "cluster: not multicast": Fault(RING, "(1 << kCluster) - 1, weights", "1 << rank_in_cluster(), weights"),
}
# Of prompt diffusion's backward, and of what the skeleton has for it.
BACKWARD_FAULTS = {
    "rows of the stage before": Fault(
        SANDWICH, "watch.look(ring_.rows_of_warp(at.stage, 0)", "watch.look(ring_.rows_of_warp(last, 0)"
    ),
    "tiles announced that nobody copies": Fault(SANDWICH, "is_first ? 1 : added", "1"),
    "dout read without a swizzle": Fault(
        ROWS,
        "tile + swizzled(row(i) * kRowBytes + column() * 2, kRowBytes)",
        "tile + row(i) * kRowBytes + column() * 2",
    ),
    "y of the first chunk alone": Fault(APT_BACKWARD, "y_ += kHopperChunk;", "", 1),
    "y of every other row": Fault(APT_BACKWARD, "y_step_(4 * op.y_stride)", "y_step_(2 * op.y_stride)"),
    "dy in the first chunk alone": Fault(APT_BACKWARD, "dy_ += kHopperChunk;", ""),
    "dy stored for rows that there are not": Fault(APT_BACKWARD, "row(i) < dy_rows_", "row(i) <= dy_rows_"),
    "dy not scaled": Fault(APT_BACKWARD, "dout[j] *= scale_;", ""),
    "gradients where ReLU lets nothing through": Fault(APT_BACKWARD, "values[i] <= 0", "values[i] < 0"),
    "share without what the scores have": Fault(APT_BACKWARD, "watch.share() + share", "watch.share()"),
    "share without what y has": Fault(APT_BACKWARD, "watch.share() + share", "share"),
    "scores of the first line alone": Fault(NEIGHBORS, "first_[line] + block * 8", "first_[0] + block * 8"),
    "gradients of the other line": Fault(NEIGHBORS, "% 2 * 2 + line]", "% 2 * 2 + (1 - line)]"),
    "scores a group late": Fault(NEIGHBORS, "next[group % kAhead]", "next[(group + 1) % kAhead]"),
    "four neighbors where eight would be": Fault(NEIGHBORS, "first - static_cast<int>(threadIdx.x) % 4 * 4", "first"),
    "eight neighbors where four are": Fault(
        LAYOUT, "kInner / 8 - block < 4 ? 2 * (kInner / 8 - block) : 8", "kInner / 8 - block < 1 ? 0 : 8"
    ),
    "scores stored for rows that there are not": Fault(
        NEIGHBORS, "has_[line] = rows.has_line(line)", "has_[line] = rows.line(line) <= rows.R"
    ),
    "shares of warps without rows": Fault(NEIGHBORS, "rows.first < rows.R", "rows.first < rows.R + kWarpRows"),
    "last group left out": Fault(NEIGHBORS, "group * 32 >= where.width()", "group * 32 + 32 >= where.width()"),
}
# Of the adapter, forward and backward.
ADAPTER_FAULTS = {
    "deviations from every chunk's own mean": Fault(ADAPTER, "if (chunk == 0) {", "{"),
    "deviations of the other line": Fault(
        ADAPTER, "const float deviation = value - pivots[line];", "const float deviation = value - pivots[1 - line];"
    ),
    "mean's part left in the products": Fault(ADAPTER, "fmaf(-row.mean, unit_sum, sum)", "sum"),
    "rest of the mean left in the products": Fault(ADAPTER, "fmaf(-row.mean_rest, unit_sum, centered)", "centered"),
    "biases of other units": Fault(ADAPTER, "vectors.biases + unit", "vectors.biases + block * 8"),
    "sums of other units": Fault(ADAPTER, "vectors.sums + unit", "vectors.sums + block * 8"),
    "bias of other columns": Fault(ADAPTER, "vectors.up_bias + column", "vectors.up_bias + column % 64"),
    "lines exchanged": Fault(ADAPTER, "[block % 2 * 2 + line] = pack_pair", "[block % 2 * 2 + (1 - line)] = pack_pair"),
    "norm's weights not folded": Fault(PACKING, "values[i] *= gains[i] * scale;", ";"),
    "one matrix multiplied twice": Fault(
        SANDWICH, "task_.left[product < Op::kLefts ? product : Op::kLefts - 1]", "task_.left[0]"
    ),
    "a tile of the two announced": Fault(SANDWICH, "is_first ? 1 : added", "1"),
    "both tiles where one is": Fault(RING, "stage * Its::kBytes + tile * Its::kTileBytes", "stage * Its::kBytes"),
    "out in the place of the second tile": Fault(
        SANDWICH,
        "store_matrices(of_lane(ring_.rows_of_warp(stage, 0), block)",
        "store_matrices(of_lane(ring_.rows_of_warp(stage, Op::kTiles - 1), block)",
    ),
    "up packed by rows": Fault(PACKING, "if (weights.order == Order::depth) {", "if (false) {"),
    "products of another block of threads": Fault(ADAPTER_BACKWARD, "static_cast<int64_t>(blockIdx.x) *", "0 *"),
    "products a group late": Fault(
        ADAPTER_BACKWARD, "load_products<kSums>(block + 4, next)", "load_products<kSums>(block, next)"
    ),
    "products of the other line": Fault(ADAPTER_BACKWARD, "units[1][2 * i] = four.z", "units[1][2 * i] = four.x"),
    "products with the norm's bias": Fault(
        ADAPTER_BACKWARD, "fmaf(gradients[i], units[i], slope)", "fmaf(gradients[i], units[i] + biases[i], slope)"
    ),
    "mean of the gradients left out": Fault(ADAPTER_BACKWARD, "gradient - terms.means[line]", "gradient"),
    "slope of the gradients left out": Fault(ADAPTER_BACKWARD, "fmaf(slope, centered,", "fmaf(0 * slope, centered,"),
    "derivative left out": Fault(ADAPTER_BACKWARD, "factor * value.derivative", "factor"),
    "x added in the place of dout": Fault(ADAPTER_BACKWARD, "added[kTiles - 1]", "added[0]"),
    "statistics stored for rows that there are not": Fault(
        ADAPTER_BACKWARD, "&& rows.has_line(line))", "&& rows.line(line) <= rows.R)"
    ),
    "share without what the bias has": Fault(ADAPTER_BACKWARD, "(share + watch.share())", "share"),
    "share of other columns' bias": Fault(ADAPTER_BACKWARD, "chunk * kHopperChunk + RowVectors", "RowVectors"),
}
PROGRAMS = {"hopper": FAULTS, "hopper_backward": BACKWARD_FAULTS, "hopper_adapter": ADAPTER_FAULTS}


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


def what_is_wrong(folder, objects, program, fault=None):
    """What the program prints; a folder before the sources' own holds the faulty file."""
    (folder / KERNELS).mkdir(parents=True)
    if fault:
        (folder / KERNELS / fault.file).write_text(planted(fault), encoding="utf-8")
    csrc = ROOT / "csrc"
    includes = [f"-I{path}" for path in (folder, csrc, csrc / "emulator", csrc / "tests")]
    compiled(
        "-O0", *includes, csrc / f"tests/faults/{program}.cpp", *objects, "-o", folder / program, "-pthread", "-ldl"
    )
    result = subprocess.run([folder / program], capture_output=True, text=True, timeout=120)
    return result.stdout if result.returncode == 0 else f"{result.stdout}ends with {result.returncode}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_wrong_without_a_fault(program, tmp_path, objects):
    assert what_is_wrong(tmp_path, objects, program) == ""


@pytest.mark.parametrize(("program", "name"), [(program, name) for program in PROGRAMS for name in PROGRAMS[program]])
def test_a_planted_fault_shows(program, name, tmp_path, objects):
    assert "wrong in" in what_is_wrong(tmp_path, objects, program, PROGRAMS[program][name])
