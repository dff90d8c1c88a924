"""From how many rows on patched modules are faster than their own code on a CPU, which petl_ext/ops/floors.py holds.

    python bench/cpu_floors.py [--keep]

measures the modules of test_patch.py, patched against unpatched, at growing numbers of rows, with no floors: in
bfloat16 and under autocast, on one thread. --keep writes bench/results/<machine>-floors.md; with --only, the rows of
other modules stay as they are. A floor is the least number of rows from which on every module gains, of those under
autocast with activations in float32 and with ones in bfloat16.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from clock import race, speed_up, thread_clock
from results import RESULTS, machine_name, processor
from shapes import Shape

import petl_ext
from petl_ext.ops.floors import FLOORS, Floors

# The modules of test_patch.py are there.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests/support"))
import test_patch

ROWS = (40, 240, 512, 1024, 2048, 4096)
# {name: (dtype of the module, of its inputs, whether under autocast)}
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "autocast, float32": (torch.float32, torch.float32, True),
    "autocast, bfloat16": (torch.float32, torch.bfloat16, True),
}
DIRECTIONS = {"forward": test_patch.forward, "forward + backward": test_patch.forward_backward}


def ratio_of(name, rows, dtypes, direction, rounds):
    """How many times faster the patched module is."""
    module_dtype, dtype, is_autocast = dtypes
    torch.manual_seed(0)
    module = test_patch.MODULES[name](768).to(module_dtype)
    patched = petl_ext.patch(copy.deepcopy(module)).model
    shape = Shape("rows", batch=1, tokens=rows, dim=768)
    arguments = test_patch.arguments_of(name, shape, dtype, trained=direction is test_patch.forward_backward)
    contenders = {"own": module, "patched": patched}
    runs = {which: direction(one, arguments, is_autocast) for which, one in contenders.items()}
    return speed_up(race(runs, rounds, thread_clock), "own", "patched")["median"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="modules whose name holds this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    petl_ext.ops.kernels.cpu_path()
    FLOORS.update(dict.fromkeys(FLOORS, Floors(0, 0, 0)))
    lines = [f"| module | dtypes | | {' | '.join(map(str, ROWS))} |", "|" + "---|" * (3 + len(ROWS))]
    print("\n".join(lines), flush=True)
    for name in test_patch.MODULES:
        if arguments.only not in name or name == "cross-attention":
            continue
        for which, dtypes in DTYPES.items():
            for direction_name, direction in DIRECTIONS.items():
                ratios = [ratio_of(name, rows, dtypes, direction, arguments.rounds) for rows in ROWS]
                lines.append(f"| {name} | {which} | {direction_name} | {' | '.join(f'{r:.2f}' for r in ratios)} |")
                print(lines[-1], flush=True)
    if arguments.keep:
        path = RESULTS / f"{machine_name(processor())}-floors.md"
        kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        table = {module_of(line): line for line in [*lines[:2], *kept, *lines] if line.startswith("|")}
        head = (
            "How many times faster patched modules are than their own code, by their number of rows, without floors.\n"
            f"Made by `python bench/cpu_floors.py --keep` on {processor()}, on one thread.\n\n"
        )
        path.write_text(head + "\n".join(table.values()) + "\n", encoding="utf-8")


def module_of(line):
    """What a line of the table is about, its columns before the numbers."""
    return tuple(line.split(" | ")[:3])


if __name__ == "__main__":
    main()
