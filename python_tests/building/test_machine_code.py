"""bench/counting walks through machine code as a GPU would: on kernels of a few lines, whose way one can tell."""

import struct

import numpy as np
import pytest
from counting import h200, model, requests, sass
from counting.analysis import of_code
from counting.emulated import Launch
from counting.machine_code import Compiled
from counting.semantics import UnknownInstruction
from counting.walk import Walker, walk_as_counted

NONE = 7  # no scoreboard


def written(lines, table=()):
    """What nvdisasm would write of a kernel. A line is a label, or an instruction with a stall count behind a bar."""
    text, position = ['.section .text.kernel,"ax",@progbits', ".text.kernel:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        instruction, _, stall = line.partition("|")
        control = (int(stall or 1) | NONE << 5 | NONE << 8) << 41
        text += [f"/*{position:04x}*/ {instruction.strip()} ; /* 0x{0:016x} */", f"/* 0x{control:016x} */"]
        position += sass.BYTES
    if table:
        text += ['.section .nv.constant2.kernel,"a"', f"/*0000*/ .byte {', '.join(f'{byte:#04x}' for byte in table)}"]
    return "\n".join(text)


def kernel_of(*lines, table=()):
    return sass.parse(written(lines, table))["kernel"]


def launch_of(*parameters, threads=32, counts=None):
    """Of one block; the parameters are ints of 32 bits."""
    packed = b"".join(struct.pack("<I", parameter & 0xFFFFFFFF) for parameter in parameters)
    return Launch("kernel", (1, 1, 1), (threads, 1, 1), 1, 0, packed, [], {}, {}, {(0, 0, 0): counts or {}})


def walked(kernel, launch):
    walker = Walker(kernel, launch, (0, 0, 0))
    return walker, walker.run()


LOOP = (
    "MOV R1, c[0x0][0x210]|2",
    ".L_x_0:",
    "IADD3 R1, R1, -0x1, RZ|4",
    "ISETP.NE.AND P0, PT, R1, RZ, PT|13",
    "@P0 BRA `(.L_x_0)|5",
    "EXIT|5",
)


def test_instructions_are_read():
    kernel = kernel_of(*LOOP)
    branch = kernel.instructions[3]
    assert (branch.name, branch.guard, branch.target, branch.stall) == ("BRA", "P0", 1, 5)
    assert (branch.sets, branch.releases, branch.waits) == (NONE, NONE, 0)
    assert kernel.instructions[1].operands == ("R1", "R1", "-0x1", "RZ")
    assert kernel.loops == [sass.Loop(1, 3)]


def test_a_loop_has_as_many_rounds_as_its_parameter_says():
    kernel, launch = kernel_of(*LOOP), launch_of(5, threads=64)
    _, walk = walked(kernel, launch)
    assert walk.issued.tolist() == [[1, 1], [5, 5], [5, 5], [5, 5], [1, 1]]
    code = of_code(launch, Compiled(kernel, 32, 0))
    assert code["stall"] == 2 + 5 * (4 + 13 + 5) + 5 and code["instructions"] == 17
    assert [(loop["rounds"], loop["stall"]) for loop in code["loops"]] == [(5, 5 * 22)]
    assert code["branches_by_data"] == 0 and code["is_as_counted"]


PARTING = (
    "S2R R0, SR_TID.X",
    "ISETP.GE.AND P0, PT, R0, 0x8, PT",
    "BSSY B0, `(.L_x_1)",
    "@P0 BRA `(.L_x_0)",
    "NOP",
    "BRA `(.L_x_1)",
    ".L_x_0:",
    "NOP",
    "NOP",
    ".L_x_1:",
    "BSYNC B0",
    "@!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "EXIT",
)


def test_lanes_that_part_meet_again():
    _, walk = walked(kernel_of(*PARTING), launch_of(threads=64))
    # Of the first warp both sides are issued, of the second one.
    assert walk.issued[4:9].tolist() == [[1, 0], [1, 0], [1, 1], [1, 1], [2, 1]]
    assert walk.issued[9].tolist() == [1, 1] and walk.off[9].tolist() == [0, 1]


def test_a_part_that_lies_behind_the_meeting_point():
    lines = ("BSSY B0, `(.L_x_1)", "@P0 BRA `(.L_x_0)", ".L_x_1:", "BSYNC B0", "NOP", "EXIT")
    apart = (".L_x_0:", "NOP", "BRA `(.L_x_1)")
    kernel = kernel_of("S2R R0, SR_TID.X", "ISETP.EQ.AND P0, PT, R0, 0x3, PT", *lines, *apart)
    _, walk = walked(kernel, launch_of())
    assert walk.issued[5].tolist() == [1]  # together, behind the meeting point


@pytest.mark.parametrize(
    ("instruction", "parameters", "result"),
    [
        ("IADD3 R4, P0, -R1, R2, RZ", (3, 10), 7),
        ("IADD3.X R4, R1, R2, RZ, PT, !PT", (3, 10), 14),
        ("IMAD R4, R1, R2, R3", (3, -2, 10), 4),
        ("IMAD.HI.U32 R4, R1, R2, RZ", (0x80000000, 6), 3),
        ("IMAD.HI R4, R1, R2, RZ", (0x80000000, 6), -3),
        ("LEA R4, R1, R2, 0x3", (5, 2), 42),
        ("LEA.HI R4, R1, R2, RZ, 0x5", (0xF8000000, 1), 32),
        ("LEA.HI.X.SX32 R4, R1, R2, 0x1, PT", (-1, 5), 5),
        ("SHF.R.S32.HI R4, RZ, 0x4, R1", (-32,), -2),
        ("SHF.R.U32.HI R4, RZ, 0x4, R1", (-32,), 0x0FFFFFFE),
        ("SHF.L.U64.HI R4, R1, 0x4, R2", (0xF0000000, 1), 31),
        ("LOP3.LUT R4, R1, R2, RZ, 0x3c, !PT", (12, 10), 6),
        ("LOP3.LUT R4, R1, 0x1f, RZ, 0xc0, !PT", (100,), 4),
        ("PRMT R4, R1, 0x9910, RZ", (0x1234FF80,), -128),
        ("PRMT R4, R1, 0x5410, R2", (0x11112222, 0x33334444), 0x44442222),
        ("SEL R4, R1, R2, !PT", (1, 2), 2),
        ("VIMNMX R4, R1, R2, PT", (-1, 2), -1),
        ("VIADDMNMX R4, R1, R2, 0x8, PT", (5, 9), 8),
        ("HFMA2.MMA R4, -RZ, RZ, 0, 5.9604644775390625e-08", (), 1),
        ("IABS R4, R1", (-9,), 9),
    ],
)
def test_what_integers_become(instruction, parameters, result):
    load = [f"MOV R{number + 1}, c[0x0][{0x210 + 4 * number:#x}]" for number in range(len(parameters))]
    walker, _ = walked(kernel_of(*load, instruction, "EXIT"), launch_of(*parameters))
    assert walker.lanes.known[4].all()
    assert set(walker.lanes.words[4].tolist()) == {result & 0xFFFFFFFF}


@pytest.mark.parametrize(
    ("first", "second", "is_less"),
    [((1, 2), (2, 2), True), ((2, 2), (1, 2), False), ((9, 1), (0, 2), True), ((0, 0), (0, -1), False)],
)
def test_64_bits_are_compared_in_two_steps(first, second, is_less):
    steps = (
        "ISETP.LT.U32.AND P0, PT, R1, c[0x0][0x218], PT",
        "MOV R2, c[0x0][0x214]",
        "ISETP.LT.AND.EX P1, PT, R2, c[0x0][0x21c], PT, P0",
    )
    walker, _ = walked(kernel_of("MOV R1, c[0x0][0x210]", *steps, "EXIT"), launch_of(*first, *second))
    assert walker.lanes.flags_known[1].all() and walker.lanes.flags[1].all() == is_less


def test_integers_are_divided_by_the_way_of_a_float():
    """As nvcc does it, for 1000 / 7."""
    lines = (
        "MOV R6, c[0x0][0x214]",
        "I2F.U32.RP R0, R6",
        "MUFU.RCP R0, R0",
        "IADD3 R2, R0, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
        "IMAD.MOV.U32 R2, RZ, RZ, RZ",
        "IMAD.MOV R5, RZ, RZ, -R3",
        "IMAD R5, R5, R6, RZ",
        "IMAD.HI.U32 R3, R3, R5, R2",
        "IMAD.HI.U32 R4, R3, c[0x0][0x210], RZ",
        "IMAD.MOV R5, RZ, RZ, -R4",
        "IMAD R5, R6, R5, c[0x0][0x210]",
        "ISETP.GE.U32.AND P0, PT, R5, R6, PT",
        "@P0 IADD3 R4, R4, 0x1, RZ",
        "EXIT",
    )
    walker, _ = walked(kernel_of(*lines), launch_of(1000, 7))
    assert walker.lanes.known[4].all() and set(walker.lanes.words[4].tolist()) == {142}


def test_bits_that_are_known_beside_others_that_are_not():
    lines = (
        "LDG.E R1, desc[UR4][R2.64]",
        "LOP3.LUT R1, R1, 0x10, RZ, 0xfc, !PT",
        "LOP3.LUT R4, R1, 0x10, RZ, 0xc0, !PT",
    )
    walker, _ = walked(kernel_of(*lines, "EXIT"), launch_of())
    assert not walker.lanes.known[1].any() and walker.lanes.known[4].all() and (walker.lanes.words[4] == 16).all()


@pytest.mark.parametrize(
    ("instruction", "forgotten"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", {4, 5, 6, 7}),
        ("LDSM.16.M88.4 R4, [R2]", {4, 5, 6, 7}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {4, 5, 6, 7}),
        ("DADD R4, R2, R8", {4, 5}),
        ("F2F.F64.F32 R4, R2", {4, 5}),
        ("F2F.F32.F64 R4, R2", {4}),
        ("I2F.F64 R4, R2", {4, 5}),
        ("SHFL.BFLY PT, R4, R2, 0x1, 0x1f", {4}),
        ("FADD R4, R2, R3", {4}),
        ("STG.E.128 desc[UR4][R2.64], R4", set()),
    ],
)
def test_what_is_not_known_any_more(instruction, forgotten):
    filled = [f"MOV R{number}, 0x{number:x}" for number in range(12)]
    walker, _ = walked(kernel_of(*filled, instruction, "EXIT"), launch_of())
    assert {number for number in range(12) if not walker.lanes.known[number].any()} == forgotten


BY_DATA = (
    "LDG.E R1, desc[UR4][R2.64]",
    "ISETP.NE.AND P0, PT, R1, RZ, PT",
    "@P0 BRA `(.L_x_0)",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    ".L_x_0:",
    "EXIT",
)


@pytest.mark.parametrize(("barriers", "is_as_counted"), [(1, True), (0, True), (2, False)])
def test_a_branch_by_data_goes_the_way_that_was_counted(barriers, is_as_counted):
    kernel, launch = kernel_of(*BY_DATA), launch_of(counts={"barriers": barriers})
    walk, found = walk_as_counted(kernel, launch, (0, 0, 0))
    assert found == is_as_counted and walk.by_rule == {2: 1}
    assert walk.issued[3].tolist() == [0 if barriers == 0 else 1]


def test_a_slow_path_is_not_entered():
    lines = (
        *BY_DATA[:3],
        "MOV R8, 0x50",
        "CALL.REL.NOINC `($slow)",
        *BY_DATA[4:],
        "$slow:",
        "RET.REL.NODEC R8 `(kernel)",
    )
    _, walk = walked(kernel_of(*lines), launch_of())
    assert walk.issued[4].tolist() == [0] and not walk.by_rule


def test_a_call_returns():
    lines = ("MOV R8, 0x20", "CALL.REL.NOINC `($part)", "NOP", "EXIT", "$part:", "RET.REL.NODEC R8 `(kernel)")
    _, walk = walked(kernel_of(*lines), launch_of())
    assert walk.issued[:, 0].tolist() == [1, 1, 1, 1, 1]


def test_a_jump_table():
    lines = ("ULDC UR4, c[0x0][0x210]", "ULDC UR4, c[0x2][UR4]", "BRXU UR4 -0x30", "NOP", "EXIT", "NOP", "NOP", "EXIT")
    kernel = kernel_of(*lines, table=(0x40, 0, 0, 0, 0x60, 0, 0, 0))
    for offset, issued in ((0, [1, 1, 1, 0, 1, 0, 0, 0]), (4, [1, 1, 1, 0, 0, 0, 1, 1])):
        _, walk = walked(kernel, launch_of(offset))
        assert walk.issued[:, 0].tolist() == issued


def test_an_instruction_that_nobody_knows():
    with pytest.raises(UnknownInstruction, match="FROBNICATE R1, R2"):
        walked(kernel_of("FROBNICATE R1, R2", "EXIT"), launch_of())


@pytest.mark.parametrize(("stride", "size", "wavefronts"), [(4, 4, 1), (8, 4, 2), (16, 16, 4), (32, 16, 8), (8, 8, 2)])
def test_wavefronts(stride, size, wavefronts):
    assert requests.wavefronts(np.arange(32) * stride, size) == wavefronts


def test_requests_of_a_walk():
    lines = (
        "S2R R0, SR_TID.X",
        "IMAD.SHL.U32 R1, R0, 0x8, RZ",
        "STS [R1+0x400], R9",
        "IMAD.WIDE.U32 R2, R0, 0x4, RZ",
        "LDG.E R9, desc[UR4][R2.64+0x1000]",
        "LDG.E R9, desc[UR4][R2.64+0x1000]",
        "EXIT",
    )
    noted = requests.Requests([(0x1000, 0x2000)])
    Walker(kernel_of(*lines), launch_of(), (0, 0, 0), requests=noted).run()
    assert noted.of_step == {
        2: {0: requests.Request(2, 0, requests.FIRST_LEVEL)},
        4: {0: requests.Request(0, 4, requests.DEVICE_MEMORY)},
        5: {0: requests.Request(0, 0, requests.FIRST_LEVEL)},
    }


def test_resident_blocks():
    """As CUDA's occupancy calculator has it."""
    assert h200.resident_blocks(128, 152, 42016) == 3  # by registers
    assert h200.resident_blocks(256, 226, 87616) == 1
    assert h200.resident_blocks(128, 32, 0) == 16  # by threads
    assert h200.resident_blocks(32, 32, 0) == 32  # by blocks
    assert h200.resident_blocks(128, 32, 100 * 1024) == 2  # by shared memory


def test_the_model_waits_for_stalls_barriers_and_pipes():
    lines = ["IADD3 R1, R1, 0x1, RZ|4"] * 10
    kernel, machine = kernel_of(*lines, "EXIT|5"), model.MACHINES["slow"]
    _, walk = walked(kernel, launch_of(threads=128))
    ways = model.ways_of(kernel, walk, requests.Requests([]), machine)
    # The last instruction is issued when all before it have stalled. Four warps have a scheduler each.
    assert model.Multiprocessor(ways, 1, machine).run() == 41
    assert model.Multiprocessor(ways, 2, machine).run() in (42, 43)
    # With eight warps on each scheduler the pipe is full: it takes an instruction every second cycle.
    assert model.Multiprocessor(ways, 8, machine).run() >= 160


def test_the_model_of_products():
    kernel, machine = kernel_of(*["HMMA.16816.F32.BF16 R4, R8, R12, R4|2"] * 100, "EXIT"), model.MACHINES["slow"]
    _, walk = walked(kernel, launch_of())
    ways = model.ways_of(kernel, walk, requests.Requests([]), machine)
    assert abs(model.Multiprocessor(ways, 1, machine).run() - 100 * machine.product) < 10
