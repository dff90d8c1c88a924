"""What the CUDA kernels ask of the machine, counted without a GPU: python bench/counts.py

Prints tables; with --write it makes bench/results/cuda-counts.json and .md anew, as `make counts` does. csrc/README.md
says what is counted and how, under "Counts".
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "build_backend")]

from counting import machine_code, measure, record, tables  # noqa: E402
from counting.cases import CASES  # noqa: E402


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases with this in their names, such as apt_forward_200")
    parser.add_argument("--rows", type=int, nargs="*", help="only these numbers of rows")
    parser.add_argument("--emulator", action="store_true", help="only what the emulator counts: needs no nvcc")
    parser.add_argument("--model", action="store_true", help="times by a model that no GPU has calibrated")
    parser.add_argument("--write", action="store_true", help="write the table of all cases")
    options = parser.parse_args(arguments)
    if options.write and (options.only or options.rows or options.emulator or options.model):
        parser.error("--write must stand alone, since the table is of all cases")
    return options


def tasks(only="", rows=None):
    cases = [case for case in CASES if only in str(case).replace(" ", "_")]
    chosen = [measure.Task(case, number) for case in cases for number in case.sizes if not rows or number in rows]
    if not chosen:
        raise SystemExit(f"--only and --rows must leave something; there are {', '.join(map(str, CASES))}")
    return chosen


def main(arguments=None):
    options = parse(arguments)
    chosen = tasks(options.only, options.rows)
    try:
        compilation = None if options.emulator else machine_code.compilation()
    except machine_code.Missing as missing:
        raise SystemExit(f"{missing}; --emulator does without") from None
    if options.model:
        print(tables.modeled(measure.run_model(chosen, compilation)))
        return
    cases, compilers = measure.count(chosen, compilation), measure.compilers(compilation)
    if options.write:
        record.JSON_FILE.write_text(record.as_text(compilers, cases))
        record.MARKDOWN_FILE.write_text(tables.counts(compilers, cases))
    else:
        print(tables.counts(compilers, cases))


if __name__ == "__main__":
    main()
