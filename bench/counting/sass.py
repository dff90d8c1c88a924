"""A kernel's machine code, as nvdisasm writes it: instructions with their control words, and loops."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

BYTES = 16  # of an instruction


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: with all its modifiers, such as "IMAD.WIDE.U32".
        guard: the predicate under which it has an effect, such as "!P0"; None: always.
        operands: as they are written, the results first.
        target: the index of the instruction that a branch names.
        stall: cycles until the warp may issue the next one, whatever the others do.
        sets, releases: the scoreboards (0 to 5) that it holds until its result is there, and until it has read its
            operands; 7: none.
        waits: the scoreboards that must be free before it, as a mask.
    """

    name: str
    guard: str | None
    operands: tuple
    target: int | None
    stall: int
    sets: int
    releases: int
    waits: int

    @property
    def opcode(self):
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Loop:
    """Instructions from the target of a backward branch to the branch."""

    first: int
    last: int


@dataclass(frozen=True)
class Kernel:
    """A kernel's code.

    Attributes:
        symbol: its mangled name.
        tables: the bytes of the constant bank that holds its jump tables.
    """

    symbol: str
    instructions: list
    tables: bytes

    @property
    def loops(self):
        """Those that backward branches make; of several with one beginning the longest."""
        ends = {}
        for index, instruction in enumerate(self.instructions):
            target = instruction.target
            if instruction.opcode == "BRA" and target is not None and target <= index:
                ends[target] = index
        return [Loop(first, last) for first, last in sorted(ends.items())]


_LABEL = re.compile(r"^(\.L_\w+|[\w$]+):$")
# Jump tables are told in a remark behind the branch.
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:\(\*.*\*\)\s*)?;\s*/\*")
_CONTROL = re.compile(r"^/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\((.*?)\)")


def parse(text):
    """{symbol: Kernel} of the text that nvdisasm -hex writes. A kernel is read when it is asked for."""
    return Kernels(text)


class Kernels(Mapping):
    def __init__(self, text):
        sections = re.split(r"^\s*\.section\s+", text, flags=re.MULTILINE)[1:]
        self._sections = {section.partition(",")[0].strip('"'): section for section in sections}
        self._read = {}

    def __getitem__(self, symbol):
        if symbol not in self._read:
            self._read[symbol] = _kernel(symbol, self._sections)
        return self._read[symbol]

    def __iter__(self):
        return (name.removeprefix(".text.") for name in self._sections if name.startswith(".text."))

    def __len__(self):
        return sum(1 for _ in self)


def _kernel(symbol, sections):
    labels, unlinked, pending = {}, [], None
    for line in map(str.strip, sections[f".text.{symbol}"].splitlines()):
        if match := _LABEL.match(line):
            labels[match[1]] = len(unlinked)
        elif match := _INSTRUCTION.match(line):
            pending = match
        elif pending and (match := _CONTROL.match(line)):
            unlinked.append((*pending.groups(), int(match[1], 16)))
            pending = None
    instructions = [_linked(labels, *parts) for parts in unlinked]
    table = sections.get(f".nv.constant2.{symbol}", "")
    bytes_of_table = [int(byte, 16) for line in re.findall(r"\.byte\s+(.*)", table) for byte in line.split(",")]
    return Kernel(symbol, instructions, bytes(bytes_of_table))


def _linked(labels, guard, name, operands, control):
    bits = control >> 41
    named = _TARGET.search(operands)
    texts = tuple(text.strip().removesuffix(".reuse") for text in operands.split(",")) if operands else ()
    target = labels.get(named[1]) if named else None
    return Instruction(name, guard, texts, target, bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
