"""Where "auto" takes a backend other than the first that holds a kernel: at sizes where it was measured to be faster.

The table is made of a measured file by bench/gpu/preferred.py and lies beside this module, as preferred.json. Where
there is none nothing has been measured, and nothing is preferred.
"""

import json
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_suffix(".json")


class Preference(NamedTuple):
    """A range of sizes of an op at which a backend was faster, at every size measured in it and in both directions.

    Attributes:
        device_name: the GPU's, as torch.cuda.get_device_name says it.
        inner: prompts P, bottleneck B or heads H.
        weights: the weights' dtype, "float32".
        least_rows, most_rows: the range.
        source: the measured file.
    """

    backend: str
    op: str
    device_name: str
    width: int
    inner: int
    weights: str
    least_rows: int
    most_rows: int
    source: str

    def covers(self, op, device_name, rows, width, inner, weights):
        return (self.op, self.device_name, self.width, self.inner, self.weights) == (
            op,
            device_name,
            width,
            inner,
            weights,
        ) and self.least_rows <= rows <= self.most_rows

    def in_words(self):
        sizes = f"{self.least_rows} to {self.most_rows} rows, width {self.width}, inner size {self.inner}"
        return f"{self.backend} for {self.op} on {self.device_name}: {sizes}, weights {self.weights} ({self.source})"


def read_preferences(path=PATH):
    """[] where there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return [Preference(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a list of preferences, as bench/gpu/preferred.py makes it: {error}"
        ) from error


PREFERENCES = read_preferences()


def backends_preferred_for(op, device_name):
    """Names of the backends that are preferred at any size, in order."""
    found = {entry.backend for entry in PREFERENCES if (entry.op, entry.device_name) == (op, device_name)}
    return sorted(found)


def preferred_backend(op, device_name, rows, width, inner, weights):
    """The backend's name, or None."""
    for preference in PREFERENCES:
        if preference.covers(op, device_name, rows, width, inner, weights):
            return preference.backend
    return None
