"""What the CUDA kernels ask of the machine, counted without a GPU, as a table: python bench/counts.py

Writes bench/results/cuda-counts.json and .md: see csrc/README.md, "Counts".
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "build_backend")]

from counting import analysis, emulated, machine_code  # noqa: E402
from counting.cases import CASES, ROWS  # noqa: E402


def count(case, rows, counter, kernels):
    """One entry for each launch of a call."""
    entries = []
    for launch in counter.launches(case, rows):
        entry = analysis.emulated(launch)
        code = analysis.compiled(launch, kernels[launch.kernel]) if kernels else None
        entry["code"] = code
        entry["bounds"] = analysis.bounds(entry, code)._asdict()
        entries.append(entry)
    return entries


def show(case, rows, entries):
    for entry in entries:
        code, bounds = entry["code"], entry["bounds"]
        largest = max(bounds, key=bounds.get)
        blocks = entry["grid"][0] * entry["grid"][1] * entry["grid"][2]
        print(
            f"{case} rows {rows}: {entry['kernel']} {blocks} blocks of {entry['threads']}, {entry['shared_bytes']} B; products {entry['products'] // blocks} a block,"
            f" wanted {entry['products_wanted']} of {entry['products']}; wavefronts {entry['wavefronts'] // blocks} least {entry['least_wavefronts'] // blocks};"
            f" L2 {entry['second_level_bytes'] // blocks} B a block; device {entry['device_bytes']} B"
        )
        if code:
            print(
                f"    registers {code['registers']}, {code['resident_blocks']} a multiprocessor; stall {code['stall']}, instructions {code['instructions']}, dead products {code['dead_products']}"
                f", {code['by_rule']} branches by rule{'' if code['is_as_counted'] else ', NOT AS COUNTED'}"
            )
            for loop in code["loops"]:
                n = loop["rounds"]
                print(
                    f"      loop {loop['at']:#x}: {n} rounds; a round: {loop['instructions'] / n:.1f} instructions, stall {loop['stall'] / n:.1f},"
                    f" HMMA {loop['products'] / n:.1f} ({loop['dead_products'] / n:.1f} dead), LDSM {loop['matrices'] / n:.1f}"
                )
        print("    us: " + ", ".join(f"{name} {value / 1000:.1f}" for name, value in bounds.items()) + f"; largest: {largest}")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="only ops of this name, such as apt_forward")
    parser.add_argument("--rows", type=int, nargs="*", help="only these numbers of rows")
    parser.add_argument("--emulator", action="store_true", help="only what the emulator counts: needs no nvcc")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    counter = emulated.Counter(emulated.build())
    kernels = None if options.emulator else machine_code.Kernels(machine_code.compilation())
    for case in CASES:
        if options.only and options.only not in str(case).replace(" ", "_"):
            continue
        for rows in case.sizes:
            if options.rows and rows not in options.rows:
                continue
            show(case, rows, count(case, rows, counter, kernels))


if __name__ == "__main__":
    main()
