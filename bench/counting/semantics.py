"""What the instructions compute that decide about branches, predicates and addresses; of others, what they write.

Sizes, indices and pointers come from the launch's parameters, so they are known. What comes from memory, and what
floats compute, is not.
"""

import itertools
import operator

import numpy as np

from counting.lanes import THIRTY_TWO, WORD, extended, flag, flags_from, register, signed

COMPARISONS = {name.upper(): getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
MERGES = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


class UnknownInstruction(LookupError):
    """One of which nobody here knows what it does."""


def _plus_carries(op, first, total, known):
    for index in range(first, len(op)):
        carry, is_known = op.flag(index)
        total, known = total + carry, known & is_known
    return total, known


def _merged(merge, mine, other):
    """Of two predicates, one of which may decide alone."""
    decisive = {"AND": False, "OR": True, "XOR": None}[merge]
    known = mine[1] & other[1] | mine[1] & (mine[0] == decisive) | other[1] & (other[0] == decisive)
    return MERGES[merge](mine[0], other[0]), known


def multiply_add(lanes, op, where, modifiers):
    """IMAD d, [carry,] a, b, c [, carry in]."""
    outs, first = flags_from(op, 1)
    is_wide, is_high = "WIDE" in modifiers, "HI" in modifiers
    (a, a_known), (b, b_known) = op.word(first), op.word(first + 1)
    c, c_known = op.pair(first + 2) if is_wide or is_high else op.word(first + 2)
    if (is_wide or is_high) and "U32" not in modifiers:
        a, b = extended(a), extended(b)
    product = (a & WORD) * (b & WORD) if "U32" in modifiers else a * b
    total, known = _plus_carries(op, first + 3, product + c, a_known & b_known & c_known)
    for out in outs:
        carried = total < c if is_wide or is_high else (product & WORD) + c >> THIRTY_TWO != 0
        lanes.put_flag(out, (carried, known), where)
    if is_wide:
        lanes.put_pair(register(op.texts[0]), (total, known), where)
    else:
        lanes.put(register(op.texts[0]), (total >> THIRTY_TWO if is_high else total, known), where)


def add_three(lanes, op, where, modifiers):
    """IADD3 d, [carries,] a, b, c [, carries in]."""
    outs, first = flags_from(op, 1)
    words = [op.word(index) for index in range(first, first + 3)]
    total, known = _plus_carries(
        op, first + 3, sum(word for word, _ in words), np.logical_and.reduce([is_known for _, is_known in words])
    )
    for number, out in enumerate(outs):
        lanes.put_flag(out, (total >> THIRTY_TWO > number, known), where)
    lanes.put(register(op.texts[0]), (total, known), where)


def add_two(lanes, op, where, modifiers):
    (a, a_known), (b, b_known) = op.word(1), op.word(2)
    lanes.put(register(op.texts[0]), (a + b, a_known & b_known), where)


def shift_add(lanes, op, where, modifiers):
    """LEA d, [carry,] a, b, [upper,] shift [, carry in]: b + (a << shift), or the upper word of what is shifted."""
    outs, first = flags_from(op, 1)
    (a, a_known), (b, b_known) = op.word(first), op.word(first + 1)
    known, next_one = a_known & b_known, first + 2
    wide = extended(a) if "SX32" in modifiers else a & WORD
    if "HI" in modifiers and "SX32" not in modifiers:
        upper, upper_known = op.word(next_one)
        wide, known, next_one = wide | upper << THIRTY_TWO, known & upper_known, next_one + 1
    shifted = wide << op.word(next_one)[0]
    if "HI" in modifiers:
        shifted = shifted >> THIRTY_TWO
    total, known = _plus_carries(op, next_one + 1, (shifted & WORD) + b, known)
    for out in outs:
        lanes.put_flag(out, (total >> THIRTY_TWO != 0, known), where)
    lanes.put(register(op.texts[0]), (total, known), where)


def shift(lanes, op, where, modifiers):
    """SHF d, low, shift, high."""
    (low, low_known), (count, count_known), (high, high_known) = op.word(1), op.word(2), op.word(3)
    most = 63 if modifiers & {"U64", "S64"} else 32
    count = np.minimum(count & WORD, np.uint64(most))
    is_signed, is_upper = bool(modifiers & {"S32", "S64"}), "HI" in modifiers
    wide = (low & WORD) | high << THIRTY_TWO
    if "L" in modifiers:
        wide = wide << count
    elif is_signed:
        wide = (wide.view(np.int64) >> count.view(np.int64)).view(np.uint64)
    else:
        wide = wide >> count
    # The usual 32-bit shifts use one of both words.
    known = count_known & (low_known | (is_upper and "L" not in modifiers))
    known = known & (high_known | (not is_upper and "L" in modifiers))
    lanes.put(register(op.texts[0]), (wide >> THIRTY_TWO if is_upper else wide, known), where)


def _logic(values, table, ones):
    """Of three values, by a table of eight bits."""
    a, b, c = values
    not_a, not_b, not_c = a ^ ones, b ^ ones, c ^ ones
    result = a ^ a
    for case in range(8):
        if table >> case & 1:
            result = result | (a if case & 4 else not_a) & (b if case & 2 else not_b) & (c if case & 1 else not_c)
    return result


def _known_logic(values, table, ones):
    """The same, and of which bits it is known: it is the same whatever the unknown ones are."""
    guesses = [(ones ^ ones,) if (known == ones).all() else (ones ^ ones, ones) for _, known in values]
    results = [
        _logic(
            [value & known | (ones ^ known) & guess for (value, known), guess in zip(values, chosen, strict=True)],
            table,
            ones,
        )
        for chosen in itertools.product(*guesses)
    ]
    always, ever = np.bitwise_and.reduce(results), np.bitwise_or.reduce(results)
    return always, always ^ ever ^ ones


def logic(lanes, op, where, modifiers):
    """LOP3.LUT [p,] d, a, b, c, table, q: p says whether any bit is set, or q does; with PAND, and q."""
    outs, first = flags_from(op, 0)
    words = [op.bits(index) for index in range(first + 1, first + 4)]
    result, known = _known_logic(words, int(op.word(first + 4)[0][0]), WORD)
    merge = "AND" if "PAND" in modifiers else "OR"
    for out in outs:
        lanes.put_flag(
            out, _merged(merge, (result != 0, (known == WORD) | (result & known != 0)), op.flag(first + 5)), where
        )
    lanes.put_bits(register(op.texts[first]), (result, known), where)


def flag_logic(lanes, op, where, modifiers):
    """PLOP3.LUT p, q, a, b, c, table of p, table of q."""
    flags = [op.flag(index) for index in (2, 3, 4)]
    for index in (0, 1):
        value = _known_logic(flags, int(op.word(5 + index)[0][0]), np.True_)
        lanes.put_flag(flag(op.texts[index]), value, where)


def compare(lanes, op, where, modifiers):
    """ISETP.how.with p, q, a, b, c [, of the lower words]: p = (a how b) with c, q = !(a how b) with c."""
    (a, a_known), (b, b_known) = op.word(2), op.word(3)
    a, b = (a & WORD, b & WORD) if "U32" in modifiers else (signed(a), signed(b))
    (how,) = modifiers & COMPARISONS.keys()
    result, known = COMPARISONS[how](a, b), a_known & b_known
    if "EX" in modifiers:
        lower, lower_known = op.flag(5)
        result, known = np.where(a == b, lower, COMPARISONS[how](a, b)), known & (lower_known | (a != b))
        if how in ("EQ", "NE"):
            result = np.where(a == b, lower, how == "NE")
    _put_merged(lanes, op, where, modifiers, (result, known))


def _put_merged(lanes, op, where, modifiers, compared):
    (merge,) = modifiers & MERGES.keys()
    result, known = compared
    for index, mine in ((0, result), (1, ~result)):
        lanes.put_flag(flag(op.texts[index]), _merged(merge, (mine, known), op.flag(4)), where)


def compare_floats(lanes, op, where, modifiers):
    """FSETP: known where both are, as constants and parameters are."""
    (a, a_known), (b, b_known) = op.word(2), op.word(3)
    hows = modifiers & {"EQ", "NEU", "LT", "LTU", "LE", "GT", "GTU", "GE", "GEU"}
    result = np.zeros(lanes.count, bool)
    known = a_known & b_known
    if len(hows) == 1 and not any(text.startswith(("-", "|")) for text in op.texts[2:4]):
        (how,) = hows
        floats = [(value & WORD).astype(np.uint32).view(np.float32) for value in (a, b)]
        with np.errstate(invalid="ignore"):
            result = COMPARISONS[how.removesuffix("U") if how != "NEU" else "NE"](*floats)
        result = result | (np.isnan(floats[0]) | np.isnan(floats[1])) & how.endswith("U")
    else:
        known = np.zeros(lanes.count, bool)
    _put_merged(lanes, op, where, modifiers, (result, known))


def select(lanes, op, where, modifiers):
    (a, a_known), (b, b_known), (first, flag_known) = op.bits(1), op.bits(2), op.flag(3)
    known = np.where(flag_known, np.where(first, a_known, b_known), a_known & b_known & ~(a ^ b))
    lanes.put_bits(register(op.texts[0]), (np.where(first, a, b), known), where)


def _least(values, least, is_signed):
    a, b = (signed(value) if is_signed else value & WORD for value in values)
    return np.where(np.where(least, a < b, a > b), *values)


def minimum(lanes, op, where, modifiers):
    """VIMNMX d, a, b, whether the least."""
    (a, a_known), (b, b_known), (least, known) = op.word(1), op.word(2), op.flag(3)
    result = _least((a, b), least, "U32" not in modifiers)
    lanes.put(register(op.texts[0]), (result, a_known & b_known & known), where)


def add_minimum(lanes, op, where, modifiers):
    """VIADDMNMX d, a, b, c, whether the least: of a + b and c."""
    (a, a_known), (b, b_known), (c, c_known), (least, known) = op.word(1), op.word(2), op.word(3), op.flag(4)
    result = _least(((a + b) & WORD, c), least, "U32" not in modifiers)
    lanes.put(register(op.texts[0]), (result, a_known & b_known & c_known & known), where)


def move(lanes, op, where, modifiers):
    lanes.put_bits(register(op.texts[0]), op.bits(1), where)


def absolute(lanes, op, where, modifiers):
    word, known = op.word(1)
    lanes.put(register(op.texts[0]), (np.abs(signed(word)).astype(np.uint64), known), where)


def load_constant(lanes, op, where, modifiers):
    if "64" in modifiers:
        lanes.put_pair(register(op.texts[0]), op.pair(1), where)
        return
    word, known = op.word(1)
    mask = {"U8": 0xFF, "U16": 0xFFFF}.get(next(iter(modifiers & {"U8", "U16"}), None), 0xFFFFFFFF)
    lanes.put(register(op.texts[0]), (word & np.uint64(mask), known), where)


def read_special(lanes, op, where, modifiers):
    number, name = register(op.texts[0]), op.texts[1]
    if name == "SRZ":
        (lanes.put if "32" in modifiers else lanes.put_pair)(number, lanes.same(0), where)
    elif name in lanes.special:
        words, known = lanes.same(0)
        lanes.put(number, (words + lanes.special[name], known), where)
    else:
        raise UnknownInstruction(f"the special register {name}")


def permute(lanes, op, where, modifiers):
    """PRMT d, a, bytes, b: four of the eight bytes of b and a."""
    (a, a_known), (chosen, chosen_known), (b, b_known) = op.bits(1), op.word(2), op.bits(3)
    results = []
    for both in (a | b << THIRTY_TWO, a_known | b_known << THIRTY_TWO):
        result = np.zeros_like(a)
        for byte in range(4):
            selector = chosen >> np.uint64(4 * byte)
            found = both >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            # The fourth bit asks for eight copies of the byte's sign.
            found = np.where(selector & np.uint64(8), (found >> np.uint64(7)) * np.uint64(0xFF), found)
            result |= found << np.uint64(8 * byte)
        results.append(result)
    lanes.put_bits(register(op.texts[0]), (results[0], results[1] * chosen_known), where)


def half_constant(lanes, op, where, modifiers):
    """HFMA2 d, -RZ, RZ, upper, lower: a way to write a constant."""
    number = register(op.texts[0])
    if tuple(text.lstrip("-") for text in op.texts[1:3]) != ("RZ", "RZ") or len(op) != 5:
        lanes.forget([number], [], where)
        return
    upper, lower = (int(np.float16(text.replace("QNAN", "nan")).view(np.uint16)) for text in op.texts[3:5])
    lanes.put(number, lanes.same(upper << 16 | lower), where)


def flags_to_register(lanes, op, where, modifiers):
    """P2R d, PR, a, mask."""
    (a, a_known), mask = op.bits(2), int(op.word(3)[0][0])
    result, known = a & ~np.uint64(mask), a_known & ~np.uint64(mask)
    for bit in range(7):
        if mask >> bit & 1:
            result = result | lanes.flags[bit].astype(np.uint64) << np.uint64(bit)
            known = known | lanes.flags_known[bit].astype(np.uint64) << np.uint64(bit)
    lanes.put_bits(register(op.texts[0]), (result, known), where)


def register_to_flags(lanes, op, where, modifiers):
    """R2P PR, a, mask."""
    (a, known), mask = op.bits(1), int(op.word(2)[0][0])
    for bit in range(7):
        if mask >> bit & 1:
            lanes.put_flag(bit, tuple((bits >> np.uint64(bit) & np.uint64(1)) != 0 for bits in (a, known)), where)


# The way of integers to a float and back, by which they are divided; it tolerates what MUFU rounds otherwise.


def _forget_pair(lanes, op, where):
    number = register(op.texts[0])
    lanes.forget([number, number + 1], [], where)


def to_float(lanes, op, where, modifiers):
    word, known = op.word(1)
    if "F64" in modifiers or "U64" in modifiers or "S64" in modifiers:
        _forget_pair(lanes, op, where)
        return
    floats = np.nextafter((word & WORD if "U32" in modifiers else signed(word)).astype(np.float32), np.float32("inf"))
    lanes.put(register(op.texts[0]), (floats.view(np.uint32).astype(np.uint64), known), where)


def approximate(lanes, op, where, modifiers):
    word, known = op.word(1)
    if "RCP" not in modifiers or op.texts[1].startswith(("-", "|")):
        known = np.zeros(lanes.count, bool)
    with np.errstate(all="ignore"):
        floats = np.float32(1) / (word & WORD).astype(np.uint32).view(np.float32)
    lanes.put(register(op.texts[0]), (floats.view(np.uint32).astype(np.uint64), known), where)


def to_integer(lanes, op, where, modifiers):
    word, known = op.word(1)
    if "F64" in modifiers or "U64" in modifiers or "S64" in modifiers:
        _forget_pair(lanes, op, where)
        return
    known = known & ("U32" in modifiers and "TRUNC" in modifiers)
    floats = (word & WORD).astype(np.uint32).view(np.float32).astype(np.float64)
    result = np.nan_to_num(np.clip(floats, 0, 2**32 - 1)).astype(np.uint64)
    lanes.put(register(op.texts[0]), (result, known), where)
