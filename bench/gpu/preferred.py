"""Makes the table by which "auto" takes Triton where it was faster than the CUDA kernels, of a file of `make gpu`.

python -m gpu.preferred ../bench/results/<GPU>/<run>.json      from bench/; writes petl_ext/ops/preferred.json
"""

import argparse
import itertools
import json
from pathlib import Path

from petl_ext.ops.preferred import PATH


def _comparisons(document):
    for step in document["steps"]:
        for record in step["records"]:
            if record["topic"] == "comparison" and "vs triton" in record.get("speed_up", {}):
                yield record


def _wins(record):
    """Beyond noise: in nine of ten rounds."""
    return record["speed_up"]["vs triton"]["p90"] < 1


def preferences_of(document, device_name, source):
    """Ranges of measured numbers of rows at which Triton won each time, forward and with backward."""

    def case(record):
        return record["op"], record["dim"], record["inner"], record["weights"]

    found = []
    for (op, width, inner, weights), records in itertools.groupby(sorted(_comparisons(document), key=case), case):
        by_rows = {}
        for record in records:
            by_rows.setdefault(record["rows"], []).append(record)
        won = [(rows, len(of_rows) == 2 and all(map(_wins, of_rows))) for rows, of_rows in sorted(by_rows.items())]
        for is_won, run in itertools.groupby(won, key=lambda entry: entry[1]):
            rows = [entry[0] for entry in run]
            if is_won:
                found.append(
                    {
                        "backend": "triton",
                        "op": op,
                        "device_name": device_name,
                        "width": width,
                        "inner": inner,
                        "weights": weights,
                        "least_rows": rows[0],
                        "most_rows": rows[-1],
                        "source": source,
                    }
                )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device-name", required=True, help="as torch.cuda.get_device_name says it")
    chosen = parser.parse_args()
    document = json.loads(chosen.file.read_text(encoding="utf-8"))
    found = preferences_of(document, chosen.device_name, f"{chosen.file.parent.name}/{chosen.file.name}")
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{PATH}: {len(found)} ranges of sizes")


if __name__ == "__main__":
    main()
