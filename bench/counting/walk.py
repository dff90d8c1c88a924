"""The way of a block of threads through a kernel's machine code, without its data.

Sizes, indices and addresses are computed as the instructions say, so loops and branches take the way that they take on
the device. A branch that depends on data takes a side by a rule, and is told: see `Walk.by_rule`.
"""

from dataclasses import dataclass, field

import numpy as np

from counting.instructions import SEMANTICS, results_of
from counting.lanes import Lanes, Operands
from counting.sass import BYTES

WARP = 32
PARAMETERS = 0x210  # where they begin in constant bank 0, on sm_90
SHARED_WINDOW = 0x7F  # the upper word of generic addresses in shared memory; which one it is makes no difference
MEMORY_OPCODES = {"LDS", "STS", "LDSM", "LDGSTS", "LDG", "STG"}
NOWHERE = np.iinfo(np.int64).max


@dataclass
class Walk:
    """What a block did.

    Attributes:
        issued: how often each warp issued each instruction, [instructions, warps].
        off: how often its predicate switched the instruction off for all lanes.
        steps: (instruction, which warps) in an order in which they may have been issued.
        off_steps: {step: for which warps the instruction was switched off}, where it was for any.
        by_rule: {instruction: how often a branch or an exit there depended on data}.
    """

    issued: np.ndarray
    off: np.ndarray
    steps: list = field(default_factory=list)
    off_steps: dict = field(default_factory=dict)
    by_rule: dict = field(default_factory=dict)


def constant_bank(launch):
    """Bank 0 as the driver fills it on sm_90."""
    bank = bytearray(PARAMETERS)
    for offset, value in zip(range(0, 24, 4), (*launch.threads, *launch.grid), strict=True):
        bank[offset : offset + 4] = int(value).to_bytes(4, "little")
    bank[0x28:0x2C] = (0xFFFDC0).to_bytes(4, "little")  # of the stack, which no kernel of ours uses
    return bytes(bank) + launch.parameters


def special_registers(launch, index):
    x, y, z = launch.threads
    thread = np.arange(x * y * z, dtype=np.uint64)
    return {
        "SR_TID.X": thread % np.uint64(x),
        "SR_TID.Y": thread // np.uint64(x) % np.uint64(y),
        "SR_TID.Z": thread // np.uint64(x * y),
        "SR_LANEID": thread % np.uint64(WARP),
        **{f"SR_CTAID.{axis}": np.uint64(number) for axis, number in zip("XYZ", index, strict=True)},
        "SR_CgaCtaId": np.uint64(0),
        "SR_SWINHI": np.uint64(SHARED_WINDOW),
    }


class Walker:
    """Walks one block of a launch.

    Args:
        sides: {instruction: whether it is taken} of branches that depend on data, in place of the rule.
        requests: a `Requests` that notes what the memory instructions ask for; None: nothing is noted.
    """

    def __init__(self, kernel, launch, index, sides=None, requests=None):
        count = int(np.prod(launch.threads))
        if count % WARP:
            raise ValueError(f"a block must have whole warps, got {count} threads")
        self.kernel, self.sides, self.requests = kernel, sides or {}, requests
        banks = {0: constant_bank(launch), 2: kernel.tables}
        self.lanes = Lanes(count, banks, special_registers(launch, index))
        self.operands = {}
        self.position = np.zeros(count, np.int64)  # of each lane; NOWHERE: it has returned
        self.waits = np.zeros(count, bool)  # at the end of a divergent part
        self.members = np.zeros((16, count), bool)  # of the divergent parts that have begun
        # Lanes that have parted issue instructions of their own, also where they are at one place, until they meet.
        self.groups = np.zeros(count, np.int64)
        turns = ("BRA", "BRX", "BRXU", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK")
        self.turns = {opcode: getattr(self, f"_{opcode.lower()}") for opcode in turns}
        size = (len(kernel.instructions), count // WARP)
        self.walk = Walk(np.zeros(size, np.int64), np.zeros(size, np.int64))

    def run(self):
        while True:
            ready = np.where(self.waits, NOWHERE, self.position)
            here = int(ready.min())
            if here == NOWHERE:
                break
            # Lanes that are behind the others go first, so that they meet where their ways do.
            active = ready == here
            self._go(here, active, int(ready.min(initial=NOWHERE, where=~active)))
        if self.waits.any():
            raise RuntimeError(f"{self.kernel.symbol}: lanes wait for others that have returned")
        return self.walk

    def _go(self, here, active, end):
        """Straight on up to a branch, or up to where other lanes are."""
        warps = active.reshape(-1, WARP).any(axis=1)
        issues = self._groups_of(active) if self.groups.any() else warps
        while here < end:
            instruction = self.kernel.instructions[here]
            self.walk.issued[here] += issues
            self.walk.steps.append((here, warps))
            value, known = self._guard(here, instruction, active, warps)
            turn = self.turns.get(instruction.opcode)
            if turn:
                self.position[active] = here
                turn(here, instruction, active, value, known)
                return
            self._compute(here, instruction, active, value, known)
            here += 1
        self.position[active] = here

    def _groups_of(self, active):
        """How many groups of lanes of each warp take part."""
        groups = np.where(active, self.groups, -1).reshape(-1, WARP)
        return np.array([np.unique(of_warp[of_warp >= 0]).size for of_warp in groups])

    def _guard(self, here, instruction, active, warps):
        """For which lanes the predicate is true, and for which it is known."""
        if instruction.guard is None:
            return active, self.lanes.everywhere
        flags, known = self.lanes.get_flag(instruction.guard)
        value = active & flags
        off = warps & ~(value | active & ~known).reshape(-1, WARP).any(axis=1)
        if off.any():
            self.walk.off[here] += off
            self.walk.off_steps[len(self.walk.steps) - 1] = off
        return value, known

    def _compute(self, here, instruction, active, value, known):
        if here not in self.operands:
            op = Operands(self.lanes, instruction.operands)
            self.operands[here] = op, results_of(instruction, op), set(instruction.name.split("."))
        op, (registers, flags), modifiers = self.operands[here]
        is_sure = known is self.lanes.everywhere
        where, maybe = (value, None) if is_sure else (value & known, active & ~known)
        if self.requests and instruction.opcode in MEMORY_OPCODES:
            self.requests.note(self.lanes, len(self.walk.steps) - 1, instruction, where if is_sure else where | maybe)
        semantics = SEMANTICS.get(instruction.opcode)
        if semantics:
            semantics(self.lanes, op, where, modifiers)
        else:
            self.lanes.forget(registers, flags, where)
        if maybe is not None and maybe.any():
            self.lanes.forget(registers, flags, maybe)

    # Where a lane goes.

    def _bra(self, here, instruction, active, taken, known):
        if "DIV" in instruction.name:
            taken = self._diverged(active)
        else:
            for text in instruction.operands[:-1]:
                value, value_known = self.lanes.get_flag(text)
                taken, known = taken & value, known & value_known | (known & ~taken)
            if not known[active].all():
                taken = np.where(known, taken, active & self._takes_by_rule(here, instruction.target))
        self.position[active] = here + 1
        self.position[taken] = instruction.target
        self._part(active & ~taken, taken)

    def _part(self, some, others):
        """Lanes of one group that go two ways are two groups."""
        if not some.any() or not others.any():
            return
        new = self.groups.max() + 1
        for warp in np.flatnonzero(some.reshape(-1, WARP).any(axis=1) & others.reshape(-1, WARP).any(axis=1)).tolist():
            lanes = slice(warp * WARP, warp * WARP + WARP)
            groups, leave = self.groups[lanes], others[lanes]
            split = leave & np.isin(groups, groups[some[lanes]])
            groups[split] += new

    def _takes_by_rule(self, here, target):
        """A slow path, for data that the compiler's fast one cannot take, is not entered. Otherwise: straight on."""
        return True if self._calls_before(here + 1, target) else self._side(here)

    def _side(self, here):
        self.walk.by_rule[here] = self.walk.by_rule.get(here, 0) + 1
        return self.sides.get(here, False)

    def _calls_before(self, first, end):
        """Whether a function is called on the way straight on to `end`."""
        for instruction in self.kernel.instructions[first:end]:
            if instruction.opcode == "CALL":
                return True
            if instruction.guard is None and instruction.opcode in ("BRA", "EXIT", "RET"):
                break
        return False

    def _diverged(self, active):
        """Lanes of warps of which other lanes are elsewhere."""
        alive = (self.position != NOWHERE).reshape(-1, WARP)
        whole = (active.reshape(-1, WARP) == alive).all(axis=1)
        return active & ~np.repeat(whole, WARP)

    def _brx(self, here, instruction, active, taken, known):
        base, offset = instruction.operands[0].split()
        op = Operands(self.lanes, (base,))
        words, words_known = op.word(0)
        if not (words_known & known)[active].all():
            raise RuntimeError(f"{self.kernel.symbol}: a jump table is entered by data")
        target = (here + 1) * BYTES + int(offset, 16) + words.astype(np.int64)
        self.position[active] = here + 1
        self.position[taken] = target[taken] // BYTES

    _brxu = _brx

    def _exit(self, here, instruction, active, taken, known):
        if not known[active].all():
            taken = np.where(known, taken, active & self._side(here))
        self.position[active] = here + 1
        self.position[taken] = NOWHERE
        self.members[:, taken] = False
        self._release()

    def _call(self, here, instruction, active, taken, known):
        self.position[active] = here + 1
        self.position[taken] = instruction.target

    def _ret(self, here, instruction, active, taken, known):
        words, words_known = Operands(self.lanes, (instruction.operands[0].split()[0],)).word(0)
        if not words_known[active].all():
            raise RuntimeError(f"{self.kernel.symbol}: the place to return to is not known")
        self.position[active] = words[active].astype(np.int64) // BYTES

    # Where lanes that part meet again.

    def _bssy(self, here, instruction, active, taken, known):
        part = int(instruction.operands[0].removeprefix("B"))
        self.members[part, active] = True
        self.position[active] = here + 1

    def _bsync(self, here, instruction, active, taken, known):
        self.waits |= active
        self._release()

    def _break(self, here, instruction, active, taken, known):
        part = int(instruction.operands[-1].removeprefix("B"))
        self.members[part, taken] = False
        self.position[active] = here + 1
        self._release()

    def _release(self):
        """Lets the lanes go on that wait for no others any more."""
        for here in np.unique(self.position[self.waits]).tolist():
            part = int(self.kernel.instructions[here].operands[0].removeprefix("B"))
            waiting = self.waits & (self.position == here)
            missing = self.members[part] & ~waiting
            free = waiting & ~np.repeat(missing.reshape(-1, WARP).any(axis=1), WARP)
            self.waits &= ~free
            self._meet(free)
            self.members[part, free] = False
            self.position[free] = here + 1

    def _meet(self, lanes):
        if not self.groups.any():
            return
        groups = np.where(lanes, self.groups, NOWHERE).reshape(-1, WARP)
        np.copyto(self.groups, np.repeat(groups.min(axis=1), WARP), where=lanes)


def walk_as_counted(kernel, launch, index, requests=None):
    """The walk of a block that multiplies, loads matrices and meets as often as the emulator counted.

    A branch that depends on data takes its other side if that makes it so. The second result says whether it is so.
    """
    counts = launch.counts[index]
    walk = Walker(kernel, launch, index, {}, requests).run()
    if _is_as_counted(kernel, walk, counts):
        return walk, True
    for here in walk.by_rule:
        if requests:
            requests.clear()
        other = Walker(kernel, launch, index, {here: True}, requests).run()
        if _is_as_counted(kernel, other, counts):
            return other, True
    return walk, False


def times_of(kernel, walk, opcode):
    """How often all warps together did instructions of that kind, the ones that were switched off left out."""
    numbers = [number for number, instruction in enumerate(kernel.instructions) if instruction.opcode == opcode]
    return int((walk.issued[numbers] - walk.off[numbers]).sum())


def _is_as_counted(kernel, walk, counts):
    wanted = {
        "HMMA": counts.get("multiply_bfloat16", 0) + counts.get("multiply_float16", 0),
        "LDSM": counts.get("load_matrices", 0) + counts.get("load_matrices_transposed", 0),
        "BAR": counts.get("barriers", 0) * walk.issued.shape[1],
    }
    return {opcode: times_of(kernel, walk, opcode) for opcode in wanted} == wanted
