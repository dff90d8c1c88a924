"""Registers and predicates of all lanes of a block. What comes from memory is unknown.

A value is a pair of arrays, one element for each lane: what it is, and whether that is known. Of words it may be known
in part; then it is told bit by bit.
"""

import re
from functools import cache

import numpy as np

WORD, NO_BITS = np.uint64(0xFFFFFFFF), np.uint64(0)
THIRTY_TWO = np.uint64(32)
NUM_REGISTERS, NUM_FLAGS = 256 + 64, 16  # the uniform ones behind a lane's own
ZEROS, TRUES = (255, 256 + 63), (7, 15)
CONSTANT = re.compile(r"c\[(0x\w+)\]\[(?:(U?R\w+)\+?)?(-?0x\w+)?\]")


@cache
def register(text):
    """The number of a register, None for what is none."""
    match = re.fullmatch(r"(U?)R(\d+|Z)|SRZ", text)
    if not match:
        return None
    return (256 if match[1] else 0) + (int(match[2]) if match[2] not in (None, "Z") else 63 if match[1] else 255)


@cache
def flag(text):
    """The number of a predicate."""
    match = re.fullmatch(r"!?(U?)P(\d|T)", text)
    return (8 if match[1] else 0) + (7 if match[2] == "T" else int(match[2])) if match else None


def signed(words):
    return ((words & WORD).astype(np.int64) ^ 0x80000000) - 0x80000000


def extended(words):
    """Words with their sign in 64 bits."""
    return signed(words).astype(np.uint64)


class Lanes:
    """The registers of `count` lanes.

    Args:
        constants: the bytes of each constant bank, by its number.
        special: the values of special registers, such as SR_TID.X: numbers or arrays.
    """

    def __init__(self, count, constants, special):
        self.count, self.constants, self.special = count, constants, special
        self.words = np.zeros((NUM_REGISTERS, count), np.uint64)
        self.known = np.zeros((NUM_REGISTERS, count), bool)
        self.known_bits = np.zeros((NUM_REGISTERS, count), np.uint64)
        self.flags = np.zeros((NUM_FLAGS, count), bool)
        self.flags_known = np.zeros((NUM_FLAGS, count), bool)
        self.known[list(ZEROS)], self.known_bits[list(ZEROS)] = True, WORD
        self.flags[list(TRUES)] = self.flags_known[list(TRUES)] = True
        self.everywhere = np.ones(count, bool)

    def put(self, number, value, where):
        if number not in ZEROS:
            np.copyto(self.words[number], value[0] & WORD, where=where)
            np.copyto(self.known[number], value[1], where=where)
            np.copyto(self.known_bits[number], np.where(value[1], WORD, NO_BITS), where=where)

    def put_bits(self, number, value, where):
        """`value`: a word, and which bits of it are known."""
        self.put(number, (value[0], value[1] == WORD), where)
        if number not in ZEROS:
            np.copyto(self.known_bits[number], value[1], where=where)

    def put_pair(self, number, value, where):
        if number not in ZEROS:
            self.put(number, value, where)
            self.put(number + 1, (value[0] >> THIRTY_TWO, value[1]), where)

    def put_flag(self, number, value, where):
        if number not in TRUES:
            np.copyto(self.flags[number], value[0], where=where)
            np.copyto(self.flags_known[number], value[1], where=where)

    def forget(self, numbers, flags, where):
        for number in numbers:
            if number not in ZEROS:
                self.known[number] &= ~where
                self.known_bits[number] *= ~where
        for number in flags:
            if number not in TRUES:
                self.flags_known[number] &= ~where

    def get_flag(self, text):
        values, known = self.flags[flag(text)], self.flags_known[flag(text)]
        return (~values if text.startswith("!") else values), known

    def constant(self, bank, offset, size):
        """What lies there in a constant bank."""
        part = self.constants[bank][offset : offset + size]
        is_there = len(part) == size and offset >= 0
        return self.same(int.from_bytes(part, "little") if is_there else 0, is_there)

    def constants_at(self, bank, offsets, size):
        values, known = np.zeros(self.count, np.uint64), np.zeros(self.count, bool)
        for offset in np.unique(offsets[0][offsets[1]]).tolist():
            here = (offsets[0] == offset) & offsets[1]
            value, is_there = self.constant(bank, offset, size)
            values[here], known[here] = value[here], is_there[here]
        return values, known

    def same(self, value, known=True):
        """One value for all."""
        return np.full(self.count, value, np.uint64), np.full(self.count, known)


class Operands:
    """The operands of one instruction, read from the registers of `lanes`."""

    def __init__(self, lanes, texts):
        self.lanes, self.texts, self._readers = lanes, texts, {}

    def __len__(self):
        return len(self.texts)

    def is_flag(self, index):
        return index < len(self.texts) and flag(self.texts[index]) is not None

    def word(self, index):
        """32 bits. A negated word is the carry of its complement larger, as the adder sees it."""
        return self._read(index, 4)

    def pair(self, index):
        """64 bits, of two registers."""
        return self._read(index, 8)

    def bits(self, index):
        """32 bits, and which of them are known."""
        words, known = self.word(index)
        number = register(self.texts[index].lstrip("-~").strip("|"))
        if number is None or number in ZEROS:
            return words & WORD, known * WORD
        # A sum with unknown bits below is unknown above.
        if self.texts[index].startswith("-"):
            return words & WORD, known * WORD
        return words & WORD, self.lanes.known_bits[number]

    def flag(self, index):
        return self.lanes.get_flag(self.texts[index])

    def _read(self, index, size):
        if (index, size) not in self._readers:
            self._readers[index, size] = self._reader(self.texts[index], size)
        return self._readers[index, size]()

    def _reader(self, text, size):
        bare = text.lstrip("-~").strip("|")
        plain = self._plain_reader(bare, size)
        if register(bare) is not None or "[" in text:
            if text.startswith("-"):
                return lambda: ((~plain()[0] & WORD) + np.uint64(1), plain()[1])
            if text.startswith("~"):
                return lambda: (~plain()[0] & WORD, plain()[1])
            return plain
        value = self.lanes.same(_immediate(text))
        return lambda: value

    def _plain_reader(self, text, size):
        lanes, number = self.lanes, register(text)
        if number in ZEROS:
            value = lanes.same(0)
            return lambda: value
        if number is not None and size == 8:
            return lambda: (
                lanes.words[number] | lanes.words[number + 1] << THIRTY_TWO,
                lanes.known[number] & lanes.known[number + 1],
            )
        if number is not None:
            return lambda: (lanes.words[number], lanes.known[number])
        if match := CONSTANT.fullmatch(text):
            bank, base, offset = int(match[1], 16), match[2], int(match[3] or "0", 16)
            if base:
                number = register(base)
                return lambda: lanes.constants_at(
                    bank, (signed(lanes.words[number]) + offset, lanes.known[number]), size
                )
            value = lanes.constant(bank, offset, size)
            return lambda: value
        return lambda: None


def _immediate(text):
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return int(text, 16) & 0xFFFFFFFF
    return int(np.float32(text.replace("QNAN", "nan")).view(np.uint32))


def flags_from(op, first):
    """The numbers of the predicates that stand there one after the other, and the operand behind them."""
    end = first
    while op.is_flag(end):
        end += 1
    return [flag(text) for text in op.texts[first:end]], end
