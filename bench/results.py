"""Where a measurement is kept: bench/results/<machine>/<date>-<commit>.json."""

import datetime
import os
import re
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def commit():
    """Of the checkout, "unknown" where it is none; the environment variable COMMIT knows better."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def machine_folder(name):
    """For the name of a processor or GPU as its vendor writes it."""
    words = re.findall(r"[\w.-]+", name.lower().replace("(r)", ""), re.ASCII)
    return RESULTS / "-".join(words)


def file_stem():
    return f"{datetime.date.today().isoformat()}-{commit()}"
