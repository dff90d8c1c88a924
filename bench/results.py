"""Where measurements are kept: one table per machine, bench/results/<machine>.json, the newest value of every case.

Each row says at which commit, on which date and with what it was measured. A run on a GPU, which is more than
comparisons, has a folder of files: bench/results/<GPU>/<date>-<commit>.*.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# What makes a case, beside its name; a row that agrees with another in all of these takes its place.
CASE = ("name", "cpu_path", "onednn_isa_limit", "threads")


def commit():
    """Of the checkout, "unknown" where it is none; the environment variable COMMIT knows better."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def file_stem():
    return f"{datetime.date.today().isoformat()}-{commit()}"


def processor():
    """This machine's, as its vendor writes it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return model[0] if model else platform.processor() or platform.machine()


def machine_name(processor):
    """Of a processor or GPU, as its vendor writes it: a name for a file or a folder."""
    return "-".join(re.findall(r"[\w.-]+", processor.lower().replace("(r)", ""), re.ASCII))


def keep(processor, rows, folder=RESULTS):
    """Puts rows into the table of a machine.

    Args:
        processor: as its vendor writes it.
        rows: dicts with the keys of `CASE`, "date" and "commit", and what was measured.

    Returns:
        The table's path.
    """
    path = folder / f"{machine_name(processor)}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["comparisons"] if path.exists() else []
    table = {_case(row): row for row in [*kept, *rows]}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in table.values())
    path.write_text(f'{{\n "machine": {json.dumps(processor)},\n "comparisons": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return path


def _case(row):
    return tuple(row[name] for name in CASE)
