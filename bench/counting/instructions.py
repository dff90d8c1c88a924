"""Who knows an instruction: what computes its results, and which registers and predicates it writes."""

from counting import semantics
from counting.lanes import ZEROS, flags_from, register

SEMANTICS = {
    **dict.fromkeys(("IMAD", "UIMAD"), semantics.multiply_add),
    **dict.fromkeys(("IADD3", "UIADD3"), semantics.add_three),
    "VIADD": semantics.add_two,
    **dict.fromkeys(("LEA", "ULEA"), semantics.shift_add),
    **dict.fromkeys(("SHF", "USHF"), semantics.shift),
    **dict.fromkeys(("LOP3", "ULOP3"), semantics.logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), semantics.flag_logic),
    **dict.fromkeys(("ISETP", "UISETP"), semantics.compare),
    "FSETP": semantics.compare_floats,
    **dict.fromkeys(("SEL", "USEL", "FSEL"), semantics.select),
    **dict.fromkeys(("VIMNMX", "IMNMX", "UIMNMX"), semantics.minimum),
    "VIADDMNMX": semantics.add_minimum,
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), semantics.move),
    "IABS": semantics.absolute,
    **dict.fromkeys(("LDC", "ULDC"), semantics.load_constant),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), semantics.read_special),
    **dict.fromkeys(("PRMT", "UPRMT"), semantics.permute),
    "HFMA2": semantics.half_constant,
    "P2R": semantics.flags_to_register,
    "R2P": semantics.register_to_flags,
    "I2F": semantics.to_float,
    "MUFU": semantics.approximate,
    "F2I": semantics.to_integer,
}

# What writes registers, but nothing that is known here.
UNKNOWN = {
    "FADD", "FMUL", "FFMA", "FMNMX", "DADD", "DMUL", "DFMA", "DSETP", "HADD2", "HMUL2", "HMNMX2", "FCHK", "FRND",
    "F2F", "F2FP", "I2FP", "LDG", "LDS", "LDSM", "HMMA", "SHFL", "VOTE", "VOTEU", "POPC", "FLO", "SGXT",
}  # fmt: skip
# What writes none.
NOTHING = {
    "NOP", "STG", "STS", "LDGSTS", "BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "CCTL", "WARPSYNC",
    "ENDCOLLECTIVE", "YIELD",
}  # fmt: skip


def _width(opcode, name):
    """Registers that a result takes."""
    modifiers = set(name.split("."))
    if opcode == "HMMA":
        return 4 if "F32" in modifiers else 2
    if "128" in modifiers or (opcode == "LDSM" and "4" in modifiers):
        return 4
    is_double = opcode in ("DADD", "DMUL", "DFMA") or name.startswith(("F2F.F64", "I2F.F64"))
    is_pair = bool(modifiers & {"64", "WIDE", "U64"}) or opcode == "CS2R" or (opcode == "LDSM" and "2" in modifiers)
    return 2 if is_double or is_pair else 1


def results_of(instruction, op):
    """The registers and the predicates that an instruction writes."""
    if instruction.opcode in NOTHING:
        return [], []
    if instruction.opcode not in UNKNOWN and instruction.opcode not in SEMANTICS:
        raise semantics.UnknownInstruction(f"{instruction.name} {', '.join(instruction.operands)}")
    flags, first = flags_from(op, 0)
    number = register(op.texts[first]) if first < len(op) and not instruction.opcode.endswith("SETP") else None
    if number is None:
        return [], flags
    carries, _ = flags_from(op, first + 1)
    width = 0 if number in ZEROS else _width(instruction.opcode, instruction.name)
    return list(range(number, number + width)), [*flags, *carries]
