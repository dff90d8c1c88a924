"""What the Hopper path's kernels ask of the machine, counted without a GPU: python bench/hopper_counts.py

Prints tables; with --write it makes bench/results/hopper-counts.json and .md anew, as `make counts` does.
csrc/README.md says what is counted and how, under "Counts".
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "build_backend")]

from counting import hopper_tables, measure, record  # noqa: E402
from counting.cases import HOPPER_CASES, HOPPER_ROWS  # noqa: E402


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables")
    options = parser.parse_args(arguments)
    cases = measure.count_hopper([measure.Task(case, rows) for case in HOPPER_CASES for rows in HOPPER_ROWS])
    compilers = measure.compilers(None)
    if options.write:
        record.HOPPER_JSON_FILE.write_text(record.as_text(compilers, cases))
        record.HOPPER_MARKDOWN_FILE.write_text(hopper_tables.counts(compilers, cases))
    else:
        print(hopper_tables.counts(compilers, cases))


if __name__ == "__main__":
    main()
