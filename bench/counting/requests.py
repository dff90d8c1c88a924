"""What the memory instructions of a walk ask for, warp by warp: wavefronts of shared memory, sectors of tensors."""

import re
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from counting.lanes import Operands
from counting.walk import WARP

SECTOR, BANKS, WORD_BYTES = 32, 32, 4
FIRST_LEVEL_SECTORS = 256  # as in csrc/emulator/requests.h
SHARED_OPCODES, GLOBAL_OPCODES = ("LDS", "STS", "LDSM", "LDGSTS"), ("LDG", "STG", "LDGSTS")
# Where what is read comes from.
DEVICE_MEMORY, SECOND_LEVEL, FIRST_LEVEL = "device memory", "second level", "first level"


class Request(NamedTuple):
    """Of one warp. Sectors that were read from the first level are not counted."""

    wavefronts: int
    sectors: int
    level: str


def access_bytes(name):
    parts = set(name.split("."))
    if "LDSM" in parts or "128" in parts:
        return 16
    return 8 if "64" in parts else 2 if parts & {"U16", "S16"} else 1 if parts & {"U8", "S8"} else 4


def wavefronts(addresses, size):
    """Of the lanes of one warp, of which some may be -1: these do not take part. Phases are of 128 bytes."""
    lanes = min(WARP, BANKS * WORD_BYTES // size)
    total = 0
    for first in range(0, WARP, lanes):
        phase = addresses[first : first + lanes]
        phase = phase[phase >= 0]
        if phase.size:
            words = np.unique((phase[:, None] + np.arange(0, size, WORD_BYTES)) // WORD_BYTES)
            total += int(np.bincount(words % BANKS).max())
    return total


class Requests:
    """Notes the requests of a block as its walk goes on.

    Args:
        private: the (begin, end) of tensors that blocks do not share: what is read of them first comes from device
            memory, of all others from the second-level cache.
    """

    def __init__(self, private):
        self.private = private
        self.clear()

    def clear(self):
        self.seen, self.latest = set(), OrderedDict()
        self.of_step = {}  # {step: {warp: Request}}

    def note(self, lanes, step, instruction, where):
        size = access_bytes(instruction.name)
        shared = instruction.opcode in SHARED_OPCODES
        of_shared = (
            addresses_of(lanes, instruction, 0 if instruction.opcode in ("STS", "LDGSTS") else 1, where)
            if shared
            else None
        )
        of_global = None
        if instruction.opcode in GLOBAL_OPCODES:
            index = next(i for i, text in enumerate(instruction.operands) if text.startswith("desc"))
            of_global = addresses_of(lanes, instruction, index, where)
            if instruction.opcode == "LDGSTS":
                of_global = np.where(_copies(lanes, instruction), of_global, -1)
        found = {}
        for warp in np.flatnonzero(where.reshape(-1, WARP).any(axis=1)).tolist():
            part = slice(warp * WARP, warp * WARP + WARP)
            count = wavefronts(of_shared[part], size) if shared else 0
            found[warp] = Request(
                count, *self._sectors(instruction.opcode, of_global[part] if of_global is not None else None)
            )
        self.of_step[step] = found

    def _sectors(self, opcode, addresses):
        if addresses is None:
            return 0, FIRST_LEVEL
        touched = np.unique(addresses[addresses >= 0] // SECTOR).tolist()
        if opcode == "STG":
            return len(touched), DEVICE_MEMORY
        missing = [sector for sector in touched if opcode == "LDGSTS" or not self._in_first_level(sector)]
        new = [sector for sector in missing if sector not in self.seen and self._is_private(sector * SECTOR)]
        self.seen.update(missing)
        return len(missing), DEVICE_MEMORY if new else SECOND_LEVEL if missing else FIRST_LEVEL

    def _in_first_level(self, sector):
        is_there = self.latest.pop(sector, False)
        self.latest[sector] = True
        if len(self.latest) > FIRST_LEVEL_SECTORS:
            self.latest.popitem(last=False)
        return is_there

    def _is_private(self, address):
        return any(begin <= address < end for begin, end in self.private)


def _copies(lanes, instruction):
    """Where an asynchronous copy reads; elsewhere it writes zeros."""
    last = instruction.operands[-1]
    if last.lstrip("!").startswith("P"):
        flag, known = lanes.get_flag(last)
        return flag | ~known
    return lanes.everywhere


def addresses_of(lanes, instruction, index, where):
    """The addresses in an operand such as [R2+UR4+0x10] or desc[UR8][R6.64+0x10]; -1 outside of `where`."""
    inside = re.findall(r"\[([^\[\]]*)\]", instruction.operands[index])[-1]
    total = np.zeros(lanes.count, np.int64)
    for term in inside.split("+"):
        text, is_pair = term.removesuffix(".64"), term.endswith(".64")
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            total = total + int(text, 16)
            continue
        op = Operands(lanes, (text,))
        words, known = op.pair(0) if is_pair else op.word(0)
        total = total + words.astype(np.int64)
        if not known[where].all():
            raise RuntimeError(f"{instruction.name} {', '.join(instruction.operands)}: an address that depends on data")
    return np.where(where, total, -1)
