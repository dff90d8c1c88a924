"""What is counted: calls of ops at the sizes of the models that they serve."""

from typing import NamedTuple

WIDTH = 768
ROWS = (240, 1920, 15360, 61440)  # ViLT at batches of 1, 8, 64 and 256
TOKENS = 197  # of an image in attention pooling
SAMPLES = (2, 10, 78, 312)  # images that have about as many tokens together
DETAILED = 2  # the place of a batch of 64 in ROWS and SAMPLES
WHOLE = 400  # rows up to which all blocks are run, so that products that are wanted can be told


class Case(NamedTuple):
    """One op in one direction at one inner size, with bfloat16 activations."""

    op: str
    direction: str
    inner: int
    weights: str = "bfloat16"

    def __str__(self):
        return f"{self.op} {self.direction} {self.inner} {self.weights}"

    @property
    def name(self):
        return f"{self.op}_{self.direction}"

    @property
    def sizes(self):
        """For each number of rows: that or of samples, the width, the inner size and tokens."""
        if self.op == "attention_pool":
            return {n * TOKENS: (n, WIDTH, self.inner, TOKENS) for n in SAMPLES}
        return {rows: (rows, WIDTH, self.inner, 0) for rows in ROWS}

    def words(self, rows):
        """What count_kernels is told."""
        sampled = ["sampled"] if rows > WHOLE else []
        return [self.op, self.direction, self.weights, *map(str, self.sizes[rows]), *sampled]

    @property
    def detailed(self):
        """The numbers of rows of which more than bounds is kept: one that is run whole, and a batch of 64."""
        sizes = list(self.sizes)
        return sizes[0], sizes[DETAILED]


CASES = (
    Case("apt", "forward", 50),
    Case("apt", "forward", 200),
    Case("apt", "forward", 50, "float32"),
    Case("apt", "forward", 200, "float32"),
    Case("apt", "backward", 50),
    Case("apt", "backward", 200),
    Case("adapter", "forward", 96),
    Case("adapter", "forward", 192),
    Case("adapter", "backward", 96),
    Case("adapter", "backward", 192),
    Case("attention_pool", "forward", 12),
    Case("attention_pool", "backward", 12),
)


class HopperCase(NamedTuple):
    """One op in one direction at one inner size by the Hopper path, of backward the rows alone; all in bfloat16."""

    op: str
    direction: str
    inner: int

    def __str__(self):
        return f"{self.op} {self.direction} {self.inner} bfloat16"

    def words(self, rows):
        """What count_kernels is told."""
        return [self.op, self.direction, "bfloat16", *map(str, (rows, WIDTH, self.inner, 0)), "hopper"]


HOPPER_ROWS = (1920, 15360, 61440)  # it takes no fewer than 1537
HOPPER_CASES = tuple(
    HopperCase(op, direction, inner)
    for op, sizes in (("apt", (50, 200)), ("adapter", (96, 192)))
    for direction in ("forward", "backward")
    for inner in sizes
)
