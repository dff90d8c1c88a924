"""What issuing the Hopper path's kernels takes: python bench/hopper_stalls.py > bench/results/hopper-stalls.md

It needs nvcc and nvdisasm, but no GPU.
"""

import re
import sys
from typing import NamedTuple

import register_report
from counting import machine_code, sass
from register_report import cuda_kernels

DIM, CHUNK = 768, 64  # the width that the table is for, and columns of a round of each loop
PARAMETERS = re.compile(r"Op<(\w+), \(\w+\)(\d)(?:, (\w+))?>, (\d+), (\d)>")
ACTIVATIONS = {"Apt": ("relu", "softmax"), "Adapter": ("relu", "gelu", "silu")}


class Stalls(NamedTuple):
    """Sums of the compiler's stall counts, in cycles, along a consumer warp's way.

    Attributes:
        name: "adapter backward gelu norm Bfloat16".
        inner, cluster: of the shape.
        first, second: for 64 columns of the first product, or of both that come first, and of the second.
        between: for a tile of rows, once.
    """

    name: str
    inner: int
    cluster: int
    first: int
    second: int
    between: int

    @property
    def of_tile(self):
        """For 128 rows."""
        return self.between + DIM // CHUNK * (self.first + self.second)


def name_of(kernel):
    """("adapter backward gelu norm Bfloat16", inner, cluster) of a kernel's readable name."""
    op, backward = re.search(r"(Apt|Adapter)Hopper(Backward)?Op", kernel).groups()
    element, activation, norm, inner, cluster = PARAMETERS.search(kernel).groups()
    direction = "backward" if backward else ""
    words = (op.lower(), direction, ACTIVATIONS[op][int(activation)], "norm" if norm == "true" else "", element)
    return " ".join(filter(None, words)), int(inner), int(cluster)


def loops_with(code, products, stores):
    """{index of its first product: sum of stall counts} of the loops with so many products and stores of matrices.

    A branch back from where a warp waits once more spans code that is not the loop's: the shortest counts.
    """
    found = {}
    for loop in code.loops:
        where = {"HGMMA": [], "STSM": []}
        for index in range(loop.first, loop.last + 1):
            where.get(code.instructions[index].opcode, []).append(index)
        if (len(where["HGMMA"]), len(where["STSM"])) == (products, stores):
            stalls = sum(max(1, i.stall) for i in code.instructions[loop.first : loop.last + 1])
            first = where["HGMMA"][0]
            found[first] = min(found.get(first, sys.maxsize), stalls)
    return found


def stalls_of(kernel, code):
    """Of a sandwich: its loops are known by their products and by what they do beside them."""
    name, inner, cluster = name_of(kernel)
    of_first, of_second = CHUNK // 16, inner // 16
    firsts = loops_with(code, of_first, 0)
    (second,) = loops_with(code, of_second, 4).values()
    (tile,) = loops_with(code, len(firsts) * of_first + of_second, 4).values()
    first = sum(firsts.values())
    return Stalls(name, inner, cluster, first, second, tile - first - second)


def all_stalls(objects, toolkit):
    found = []
    for path in objects:
        kernels = sass.parse(machine_code.text_of_code(path, toolkit))
        for name, symbol in zip(register_report.readable(list(kernels)), kernels, strict=True):
            if "hopper_sandwich" in name:
                found.append(stalls_of(name, kernels[symbol]))
    return sorted(found)


def table(stalls):
    columns = ["inner", "cluster", "first", "second", "between", f"128 rows, D = {DIM}"]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for s in stalls:
        lines.append(f"| {s.name} | {s.inner} | {s.cluster} | {s.first} | {s.second} | {s.between} | {s.of_tile} |")
    return "\n".join(lines)


def main():
    compilation = register_report.every_architecture()
    compilation.folder.mkdir(parents=True, exist_ok=True)
    sources = [path for path in cuda_kernels.sources_for(compilation.architectures) if cuda_kernels.is_for_hopper(path)]
    objects = [cuda_kernels.compile_one(source, compilation, 1) for source in sources]
    print(f"By nvcc, {machine_code.version(compilation)}: sums of stall counts, in cycles of a consumer warp, for 64")
    print("columns of each product (of both first ones in the adapter's backward) and, between them, for a tile of")
    print("128 rows. What it waits for is not in them.\n")
    print(table(all_stalls(objects, compilation.toolkit)))


if __name__ == "__main__":
    sys.exit(main())
