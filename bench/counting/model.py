"""A model of one multiprocessor: how many cycles resident blocks take together, and from that the time of a launch.

Warps issue the instructions of their walk, each as its stall count and its scoreboards say; pipes, shared memory and
the ways to the second-level cache and to device memory serve one request after the other. Latencies and throughputs are
leads from the literature; NO GPU HAS CALIBRATED THEM. "slow" and "fast" are two sets of them, between which the truth
is thought to lie. Instruction fetch, address translation and the pages of device memory are left out.
"""

import math
from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

from counting import h200
from counting.analysis import private_memory
from counting.requests import DEVICE_MEMORY, SECTOR, Requests
from counting.walk import walk_as_counted

SCHEDULERS = 4
QUEUE = 32  # cycles that requests to the memory pipe may be ahead of it


class Machine(NamedTuple):
    """Clocks unless it says otherwise."""

    clock: float  # Hz
    second_level_speed: float  # bytes per second
    product: float  # of the tensor cores of one scheduler
    device_latency: int
    second_level_latency: int
    jump: int
    launch: float  # seconds, with the last blocks' end
    waits_for_waves: bool

    def per_clock(self, speed):
        return speed / h200.MULTIPROCESSORS / self.clock


MACHINES = {
    "slow": Machine(1.755e9, 5.5e12, 6.4, 800, 300, 6, 3e-6, True),
    "fast": Machine(1.98e9, 7e12, 4.2, 650, 260, 0, 2e-6, False),
}
FIRST_LEVEL_LATENCY, BARRIER_LATENCY = 40, 18


class Cost(NamedTuple):
    """Of an instruction: its pipe and how long it is busy, and when the result is there."""

    pipe: str | None = None
    busy: float = 1
    latency: int = 0
    wavefronts: int = 0  # of the memory pipe, for what is no access


COSTS = {
    **dict.fromkeys(("IMAD", "UIMAD"), Cost("fma", 2)),
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "HMUL2"), Cost("fma", 1)),
    **dict.fromkeys(("DADD", "DMUL", "DFMA"), Cost("double", 2, 20)),
    "MUFU": Cost("special", 8, 25),
    **dict.fromkeys(("F2F", "F2FP"), Cost("alu", 2, 6)),
    "SHFL": Cost(latency=25, wavefronts=2),
    "LDC": Cost(latency=25),
    "ULDC": Cost(latency=12),
}
CONTROL = {
    "BRA",
    "BRX",
    "BRXU",
    "BSSY",
    "BSYNC",
    "EXIT",
    "CALL",
    "RET",
    "NOP",
    "WARPSYNC",
    "BAR",
    "DEPBAR",
    "LDGDEPBAR",
}
MATRIX_LATENCY, SHARED_LATENCY, READ_LATENCY = 33, 28, 20


def cost_of(instruction, machine):
    if instruction.opcode == "HMMA":
        return Cost("tensor", machine.product, MATRIX_LATENCY)
    return COSTS.get(instruction.opcode, Cost() if instruction.opcode in CONTROL else Cost("alu", 2))


class Step(NamedTuple):
    """An instruction of a warp's way."""

    opcode: str
    stall: int
    sets: int
    releases: int
    waits: int
    cost: Cost
    pending: int  # groups of copies that a wait leaves under way
    jumps: bool
    request: tuple | None


def ways_of(kernel, walk, requests, machine):
    """What each warp of a block issues, in order."""
    costs = [cost_of(instruction, machine) for instruction in kernel.instructions]
    ways, last = [[] for _ in range(walk.issued.shape[1])], {}
    for number, (here, warps) in enumerate(walk.steps):
        instruction = kernel.instructions[here]
        pending = int(instruction.operands[1], 16) if instruction.name.startswith("DEPBAR") else 0
        found = requests.of_step.get(number, {})
        off = walk.off_steps.get(number)
        for warp, there in enumerate(warps.tolist()):
            if not there:
                continue
            cost = costs[here]
            if off is not None and off[warp] and instruction.opcode == "HMMA":
                cost = cost._replace(busy=0.5)
            jumps = last.get(warp, here - 1) != here - 1
            last[warp] = here
            ways[warp].append(
                Step(
                    instruction.opcode,
                    max(1, instruction.stall),
                    instruction.sets,
                    instruction.releases,
                    instruction.waits,
                    cost,
                    pending,
                    jumps,
                    found.get(warp),
                )
            )
    return ways


class Warp:
    def __init__(self, way, block):
        self.way, self.block = way, block
        self.next = 0
        self.ready = 0.0
        self.scoreboards = [0.0] * 6
        self.groups, self.open = [], 0.0  # when its groups of copies will be there
        self.at_barrier = False

    def can_issue(self, pipes, memory_pipe, machine):
        """When its next instruction can be issued."""
        step = self.way[self.next]
        time = self.ready + (machine.jump if step.jumps else 0)
        for number in range(6):
            if step.waits >> number & 1:
                time = max(time, self.scoreboards[number])
        if step.opcode == "DEPBAR" and len(self.groups) > step.pending:
            time = max(time, self.groups[len(self.groups) - 1 - step.pending])
        if step.cost.pipe:
            time = max(time, pipes[step.cost.pipe])
        if step.request or step.cost.wavefronts:
            time = max(time, memory_pipe - QUEUE)
        return time


class Multiprocessor:
    """Runs `resident` blocks whose warps go these ways."""

    def __init__(self, ways, resident, machine):
        self.machine = machine
        self.warps_of_block = len(ways)
        warps = [Warp(way, block) for block in range(resident) for way in ways]
        self.schedulers = [
            [warp for number, warp in enumerate(warps) if number % len(ways) % SCHEDULERS == scheduler and warp.way]
            for scheduler in range(SCHEDULERS)
        ]
        self.pipes = [defaultdict(float) for _ in range(SCHEDULERS)]
        self.memory_pipe = self.second_level = self.device_memory = 0.0
        self.waiting = defaultdict(list)

    def run(self):
        """Cycles until the last instruction is issued."""
        now, turns = 0, [0] * SCHEDULERS
        while any(self.schedulers):
            issued, soonest = False, math.inf
            for number, warps in enumerate(self.schedulers):
                chosen, time = self._choose(number, turns[number], now)
                if chosen is None:
                    soonest = min(soonest, time)
                    continue
                issued = True
                turns[number] = warps.index(chosen)
                self._issue(chosen, number, now)
                if chosen.next == len(chosen.way):
                    warps.remove(chosen)
            now = now + 1 if issued else max(now + 1, math.ceil(soonest))
        return now

    def _choose(self, scheduler, first, now):
        """A warp that can issue, the one that issued last before the others; or when the next one can."""
        warps, soonest = self.schedulers[scheduler], math.inf
        for offset in range(len(warps)):
            warp = warps[(first + offset) % len(warps)]
            if warp.at_barrier:
                continue
            time = warp.can_issue(self.pipes[scheduler], self.memory_pipe, self.machine)
            if time <= now:
                return warp, now
            soonest = min(soonest, time)
        return None, soonest

    def _issue(self, warp, scheduler, now):
        step = warp.way[warp.next]
        warp.next += 1
        warp.ready = now + step.stall
        if step.cost.pipe:
            pipe = self.pipes[scheduler]
            free = pipe[step.cost.pipe]
            # Within a cycle of its end the pipe has not waited.
            pipe[step.cost.pipe] = (free if now - free < 1 else now) + step.cost.busy
        done, read = self._request(step, now) if step.request else (now + step.cost.latency, now + 8)
        if step.cost.wavefronts:
            self.memory_pipe = max(self.memory_pipe, now) + step.cost.wavefronts
            done, read = self.memory_pipe + step.cost.latency, self.memory_pipe
        if step.opcode == "LDGSTS":
            warp.open, done = max(warp.open, done), now + READ_LATENCY
        elif step.opcode == "LDGDEPBAR":
            warp.groups.append(warp.open)
        elif step.opcode == "BAR":
            self._meet(warp, now)
        if step.sets < 6:
            warp.scoreboards[step.sets] = max(warp.scoreboards[step.sets], done)
        if step.releases < 6:
            warp.scoreboards[step.releases] = max(warp.scoreboards[step.releases], read)

    def _request(self, step, now):
        """When a request is done, and when it has read its registers."""
        request, machine = step.request, self.machine
        bytes_ = request.sectors * SECTOR
        self.memory_pipe = max(self.memory_pipe, now) + max(request.wavefronts, bytes_ / 128)
        done, read = self.memory_pipe, max(self.memory_pipe, now + READ_LATENCY)
        if not bytes_:
            latency = (
                MATRIX_LATENCY
                if step.opcode == "LDSM"
                else FIRST_LEVEL_LATENCY
                if step.opcode == "LDG"
                else SHARED_LATENCY
            )
            return done + latency, read
        self.second_level = max(self.second_level, now) + bytes_ / machine.per_clock(machine.second_level_speed)
        done = max(done, self.second_level)
        if request.level == DEVICE_MEMORY:
            self.device_memory = max(self.device_memory, now) + bytes_ / machine.per_clock(h200.MEMORY_SPEED * 1e9)
            done = max(done, self.device_memory)
        if step.opcode == "STG":
            return done, read
        return done + (machine.device_latency if request.level == DEVICE_MEMORY else machine.second_level_latency), read

    def _meet(self, warp, now):
        warp.at_barrier = True
        self.waiting[warp.block].append(warp)
        if len(self.waiting[warp.block]) == self.warps_of_block:
            for other in self.waiting.pop(warp.block):
                other.at_barrier, other.ready = False, max(other.ready, now + BARRIER_LATENCY)


def _seconds(blocks, resident, ways, machine):
    """Of a launch. Where a wave begins when the one before has ended, its last blocks may be alone; else blocks take
    the places of others as these end.
    """
    seconds_of = lru_cache(lambda number: Multiprocessor(ways, number, machine).run() / machine.clock)
    waves = blocks / (h200.MULTIPROCESSORS * resident)
    whole, rest = divmod(blocks, h200.MULTIPROCESSORS * resident)
    if whole and not machine.waits_for_waves:
        return waves * seconds_of(resident)
    last = seconds_of(h200.divide_up(rest, h200.MULTIPROCESSORS)) if rest else 0
    return (whole * seconds_of(resident) if whole else 0) + last


def of_launches(launches, kernels):
    """{"slow": [nanoseconds of each launch], "fast": the same}, of the block that asks for most."""
    times = {name: [] for name in MACHINES}
    for launch, kernel in zip(launches, kernels, strict=True):
        requests = Requests(private_memory(launch))
        walk, _ = walk_as_counted(kernel.code, launch, launch.busiest, requests)
        threads = walk.issued.shape[1] * h200.WARP
        resident = h200.resident_blocks(threads, kernel.registers, launch.shared_bytes + kernel.static_shared_bytes)
        for name, machine in MACHINES.items():
            ways = ways_of(kernel.code, walk, requests, machine)
            times[name].append(round(1e9 * (_seconds(launch.blocks, resident, ways, machine) + machine.launch)))
    return times
