"""The bytes that an op has to move through device memory, and the goals that are set in shares of them.

Counted are passes over the tensors with as many rows as the activations; the weights are small beside them. What a
kernel reads twice within one tile of rows comes from the cache the second time and counts once.
"""

from dataclasses import dataclass

from problems import TOKENS

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
ELEMENT = 2  # bytes, of bfloat16
POOL_BLOCK = 64  # tokens of one block of attention pooling's kernels


@dataclass(frozen=True)
class Passes:
    """So many passes over [rows, dim], and over [rows, inner] rounded up to whole 16-byte words."""

    wide: int
    narrow: int = 0

    def bytes(self, rows, dim, inner):
        return ELEMENT * rows * (self.wide * dim + self.narrow * ((inner + 7) // 8 * 8))

    def __str__(self):
        return f"{ELEMENT} rows ({self.wide} dim + {self.narrow} ceil8(inner)) bytes"


@dataclass(frozen=True)
class PoolPasses:
    """So many passes over the tokens [rows, dim], over what there is of each sample, [inner, dim], and over what there
    is of each of its blocks of tokens, [inner, dim] in float32.
    """

    tokens: int
    samples: int
    blocks: int = 0

    def bytes(self, rows, dim, inner):
        samples = max(1, rows // TOKENS)
        blocks = samples * -(-rows // samples // POOL_BLOCK)
        return dim * (
            ELEMENT * (self.tokens * rows + self.samples * samples * inner) + 4 * self.blocks * blocks * inner
        )

    def __str__(self):
        small = f"{ELEMENT} {self.samples} samples + 4 {self.blocks} blocks"
        return f"dim ({ELEMENT} {self.tokens} rows + inner ({small})) bytes"


# Each input read once, each output written once.
LEAST = {
    # x, y -> out; and dout, x, y -> dx, dy
    ("apt", FORWARD): Passes(3),
    ("apt", FORWARD_BACKWARD): Passes(3 + 5),
    # x -> out; and dout, x -> dx
    ("adapter", FORWARD): Passes(2),
    ("adapter", FORWARD_BACKWARD): Passes(2 + 3),
    # visual, query -> pooled; and dpooled, visual, query, pooled -> dvisual, dquery
    ("attention_pool", FORWARD): PoolPasses(1, 2),
    ("attention_pool", FORWARD_BACKWARD): PoolPasses(1 + 2, 2 + 4),
}
# As the kernels are made: backward is a kernel over the rows and one for the weights' gradients, which share tensors of
# [rows, inner].
OWN = {
    ("apt", FORWARD): Passes(3),
    # x, y -> out, scores; dout, y, scores -> dx, dy, dscores, weighted; x, dout, dscores, weighted -> weights
    ("apt", FORWARD_BACKWARD): Passes(3 + 4 + 2, 1 + 3 + 2),
    ("adapter", FORWARD): Passes(2),
    # x -> out; x -> hidden units; dout, x, hidden units -> dx, dhidden, hidden; x, dout, dhidden, hidden -> weights.
    # The hidden units before the activation are float32, and count twice.
    ("adapter", FORWARD_BACKWARD): Passes(2 + 1 + 3 + 2, 2 + 4 + 2),
    # visual, query -> sums of blocks; these -> pooled
    ("attention_pool", FORWARD): PoolPasses(1, 2, 2),
    # the same; pooled, dpooled -> means; visual, query, dpooled -> dvisual, sums of blocks; these -> dquery
    ("attention_pool", FORWARD_BACKWARD): PoolPasses(1 + 2, 2 + 2 + 3, 2 + 2),
}


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        share: of the speed of a copy kernel, the op's own traffic taken.
        eager, compile: how many times faster than these.
        inner: the sizes for which it is set.
    """

    share: float
    eager: float
    compile: float
    inner: tuple


GOALS = {
    ("apt", FORWARD): Goal(0.65, 2.5, 1.4, (50, 200)),
    ("apt", FORWARD_BACKWARD): Goal(0.60, 2.0, 1.3, (200,)),
    ("adapter", FORWARD): Goal(0.65, 3.0, 2.4, (96, 192)),
    ("adapter", FORWARD_BACKWARD): Goal(0.60, 2.2, 1.8, (96, 192)),
    # Against what tokens pooled first take in eager PyTorch and compiled, not against attention with all projections.
    ("attention_pool", FORWARD): Goal(0.65, 1.4, 1.0, (12,)),
    ("attention_pool", FORWARD_BACKWARD): Goal(0.60, 1.9, 1.0, (12,)),
}


def verdicts(op, direction, inner, share, speed_ups):
    """Per goal: what was to be reached, what was, and whether that is enough. Nothing where no goal is set."""
    goal = GOALS[op, direction]
    if inner not in goal.inner:
        return {}
    reached = {"share of own traffic": (goal.share, share)}
    for name in ("eager", "compile"):
        if f"vs {name}" in speed_ups:
            reached[f"vs {name}"] = (getattr(goal, name), speed_ups[f"vs {name}"]["median"])
    return {name: {"goal": goal_, "reached": now, "met": now >= goal_} for name, (goal_, now) in reached.items()}
