"""How a step tells the runner what it found: one JSON object per line, so that what is written stays if it crashes."""

import json
import os
from pathlib import Path

FILE = "PETL_RECORDS"  # the environment variables that a step is given
SECONDS = "PETL_SECONDS"


def record(topic, **values):
    """Adds to the runner's JSON; without the runner it is printed.

    Args:
        topic: "summary", whose `text` stands in the step's one line on the terminal, or whatever the step measures.
    """
    line = json.dumps({"topic": topic, **values})
    if not os.environ.get(FILE):
        print(line, flush=True)
        return
    with open(os.environ[FILE], "a") as file:
        file.write(line + "\n")


def read_records(path):
    """All that were written whole."""
    found = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the step was killed while it wrote
    return found


def seconds_granted(default):
    """How long the runner lets this step run."""
    return float(os.environ.get(SECONDS) or default)
