"""A model of the Hopper path's kernels, step by step of their rings, on all multiprocessors at once:

    python bench/hopper_model.py > bench/results/hopper-model.md

NO GPU HAS CALIBRATED IT. What issuing takes is from bench/results/hopper-stalls.md; everything else that it asks of the
machine follows from the sizes. Device memory, the way from the second-level cache, each multiprocessor's own way and
its tensor cores serve one after the other; "slow" and "fast" are two sets of speeds, between which the truth is thought
to lie.
"""

import heapq
import re
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import NamedTuple

from counting import h200, record
from results import RESULTS

WIDTH, CHUNK, ROWS, GROUPS, ELEMENT = 768, 64, 128, 2, 2  # columns, columns of a step, rows of a tile, groups, bytes
SIZES = (15360, 61440)
TILE = ROWS * CHUNK * ELEMENT
PRODUCER = 225  # cycles for a step
SHARED = 227 * 1024 - 256


class Machine(NamedTuple):
    clock: float  # Hz
    second_level: float  # bytes per second
    memory_latency: int  # cycles
    second_level_latency: int
    share_of_peak: float  # of the tensor cores
    launch: float  # microseconds


MACHINES = {"fast": Machine(1.98e9, 7.0e12, 650, 260, 0.95, 2), "slow": Machine(1.755e9, 5.5e12, 800, 300, 0.80, 3)}


class Product(NamedTuple):
    """Of one product, what a step of a block asks for beside its weights, in bytes.

    Attributes:
        copied: tiles of rows by the ring, from device memory.
        again: the same, of what has been read before: from the second-level cache while that holds it.
        read: by the consumers themselves, a step ahead.
        written: to device memory.
    """

    copied: int = 0
    again: int = 0
    read: int = 0
    written: int = 0


class Between(NamedTuple):
    """What a tile of rows asks for between its products: bytes, and how often a warp waits for the L2 cache."""

    read: int = 0  # from device memory, fetched beforehand
    written: int = 0
    waits: int = 0


class Kernel(NamedTuple):
    """A kernel at one size.

    Attributes:
        name, inner, cluster: as in the table of stall counts; inner: of the shape.
        case: what the lean kernels' counts call it.
        products: the last one writes rows.
        tiles: of rows in a stage.
    """

    name: str
    inner: int
    cluster: int
    case: str
    products: tuple
    between: Between
    tiles: int = 1

    @property
    def stages(self):
        return min(8, SHARED // (self.tiles * TILE + self.weights))

    @property
    def weights(self):
        """Bytes of a tile."""
        return self.inner * CHUNK * ELEMENT


def kept_bytes(width, number=1):
    """Of so many matrices of so many columns, for a tile of rows."""
    return number * ROWS * width * ELEMENT


def kernels():
    reads, adds = Product(copied=TILE), Product(copied=TILE, written=TILE)
    for prompts, inner, cluster in ((50, 64, 1), (200, 208, 2)):
        case = f"apt forward {prompts} bfloat16"
        yield Kernel("apt relu Bfloat16", inner, cluster, case, (reads, adds), Between())
        first = Product(copied=TILE, read=TILE, written=TILE)
        kept = kept_bytes(-(-prompts // 8) * 8)
        case = f"apt backward {prompts} bfloat16"
        between = Between(read=kept, written=2 * kept, waits=inner // 64)
        yield Kernel("apt backward relu Bfloat16", inner, cluster, case, (first, Product(written=TILE)), between)
    for bottleneck, inner in ((96, 96), (192, 192)):
        case = f"adapter forward {bottleneck} bfloat16"
        second = Product(again=TILE, written=TILE)
        yield Kernel("adapter gelu norm Bfloat16", inner, 2, case, (reads, second), Between())
        case = f"adapter backward {bottleneck} bfloat16"
        between = Between(written=kept_bytes(bottleneck, 2), waits=inner // 32)
        second = Product(again=2 * TILE, written=TILE)
        yield Kernel("adapter backward gelu norm Bfloat16", inner, 2, case, (reads, reads, second), between, tiles=2)


class Queue:
    """Serves so much per cycle, one request after the other."""

    def __init__(self, rate):
        self.rate, self.free = rate, 0.0

    def serve(self, when, amount):
        """When it is done."""
        if amount:
            self.free = max(self.free, when) + amount / self.rate
        return max(self.free, when) if amount else when


@dataclass
class Block:
    """A block of threads: how far its producer is, and which steps of the ring are full or free again."""

    number: int
    tiles: int  # of its cluster's turns
    own: int  # those with rows
    filled: int = 0
    arrivals: dict = field(default_factory=dict)  # by step: how many of its copies have come, and when the last
    releases: dict = field(default_factory=dict)  # by step: how many consumers need it no more, and since when


@dataclass
class Consumer:
    step: int = 0
    time: float = 0.0
    last: tuple | None = None  # the step whose products may be under way, and when they are done
    beside: float = 0.0  # when what it reads itself is there


class Simulation:
    def __init__(self, kernel, stalls, rows, machine, keeps_rows):
        self.kernel, self.stalls, self.machine, self.keeps_rows = kernel, stalls, machine, keeps_rows
        cycles = machine.clock
        self.memory = Queue(h200.MEMORY_SPEED * 1e9 / cycles)
        self.second_level = Queue(machine.second_level / cycles)
        tiles = -(-rows // ROWS)
        blocks = min(-(-tiles // kernel.cluster) * kernel.cluster, h200.MULTIPROCESSORS)
        self.blocks = []
        for number in range(blocks):
            turns = len(range(number - number % kernel.cluster, tiles, blocks))
            self.blocks.append(Block(number, turns, len(range(number, tiles, blocks))))
        self.ways = [Queue(64.0) for _ in self.blocks]
        self.tensor_cores = [Queue(2048 * machine.share_of_peak) for _ in self.blocks]
        self.consumers = [[Consumer() for _ in range(GROUPS)] for _ in self.blocks]
        self.steps = WIDTH // CHUNK
        self.events, self.order, self.end = [], count(), 0.0

    def at(self, when, act, *arguments):
        heapq.heappush(self.events, (when, next(self.order), act, arguments))

    def run(self):
        """Microseconds of the launch."""
        for block in self.blocks:
            self.at(0.0, self.fill, block)
            for consumer in self.consumers[block.number]:
                self.at(0.0, self.consume, block, consumer)
        while self.events:
            when, _, act, arguments = heapq.heappop(self.events)
            self.end = max(self.end, when)
            act(when, *arguments)
        return max(self.end, self.memory.free) / self.machine.clock * 1e6 + self.machine.launch

    def position(self, step):
        """Of a step of the ring: the tile, which product, and the step of it."""
        tile, rest = divmod(step, self.steps * len(self.kernel.products))
        return tile, *divmod(rest, self.steps)

    def cluster_of(self, block):
        first = block.number - block.number % self.kernel.cluster
        return self.blocks[first : first + self.kernel.cluster]

    def fill(self, when, block):
        """Copies of the next step, once its stage is free."""
        step, stages = block.filled, self.kernel.stages
        tile, product, column = self.position(step)
        if tile >= block.tiles:
            return
        if step >= stages:
            number, since = block.releases.get(step - stages, (0, 0.0))
            if number < GROUPS * self.kernel.cluster:
                return  # the last release calls again
            if since > when:
                self.at(since, self.fill, block)
                return
        block.filled += 1
        has_rows = tile < block.own
        if product == 0 and column == 0 and has_rows:
            self.memory.serve(when, self.kernel.between.read)
        self.arrive(when, block, step, self.copy_rows(when, block, self.kernel.products[product]) if has_rows else when)
        share = self.kernel.weights / self.kernel.cluster
        sent = self.second_level.serve(when, share)
        for other in self.cluster_of(block):
            come = self.ways[other.number].serve(sent, share) + self.machine.second_level_latency
            self.arrive(when, other, step, come)
        self.at(when + PRODUCER, self.fill, block)

    def copy_rows(self, when, block, product):
        from_memory = product.copied + (0 if self.keeps_rows else product.again)
        bytes_of_rows = product.copied + product.again
        if not bytes_of_rows:
            return when
        come = self.second_level.serve(self.memory.serve(when, from_memory), bytes_of_rows)
        latency = self.machine.memory_latency if from_memory else self.machine.second_level_latency
        return self.ways[block.number].serve(come, bytes_of_rows) + latency

    def arrive(self, now, block, step, when):
        number, latest = block.arrivals.get(step, (0, 0.0))
        block.arrivals[step] = number + 1, max(latest, when)
        if self.is_full(block, step):
            for consumer in self.consumers[block.number]:
                if consumer.step == step:
                    self.at(max(now, consumer.time, block.arrivals[step][1]), self.consume, block, consumer)

    def is_full(self, block, step):
        return block.arrivals.get(step, (0, 0.0))[0] == 1 + self.kernel.cluster

    def release(self, block, step, when):
        for other in self.cluster_of(block):
            number, since = other.releases.get(step, (0, 0.0))
            since = max(since, when + (200 if other is not block else 20))
            other.releases[step] = number + 1, since
            if number + 1 == GROUPS * self.kernel.cluster and other.filled == step + self.kernel.stages:
                self.at(since, self.fill, other)

    def consume(self, when, block, consumer):
        step = consumer.step
        tile, product, _ = self.position(step)
        if tile >= block.tiles or not self.is_full(block, step):
            return
        begin = max(consumer.time, block.arrivals[step][1])
        if begin > when:
            self.at(begin, self.consume, block, consumer)
            return
        consumer.step += 1
        products = ROWS // GROUPS * CHUNK * self.kernel.inner
        done = self.tensor_cores[block.number].serve(when + 60, products) + 60
        has_rows = tile < block.own
        if product < len(self.kernel.products) - 1:
            self.sum(when, block, consumer, step, done, has_rows)
        else:
            self.write(block, consumer, step, done, has_rows)
        self.at(consumer.time, self.consume, block, consumer)

    def sum(self, when, block, consumer, step, done, has_rows):
        """A step of a first product: the next one may begin when the one before it is done."""
        _, product, column = self.position(step)
        what = self.kernel.products[product]
        firsts = len(self.kernel.products) - 1
        issued = max(when + self.stalls.first / firsts, consumer.beside if what.read else 0.0)
        if has_rows:
            self.memory.serve(issued, what.written / GROUPS)
            come = self.second_level.serve(self.memory.serve(issued, what.read / GROUPS), what.read / GROUPS)
            consumer.beside = come + self.machine.memory_latency
        if consumer.last:
            before, done_before = consumer.last
            issued = max(issued, done_before)
            self.release(block, before, issued)
        consumer.last, consumer.time = (step, done), issued
        if column == self.steps - 1:
            self.release(block, step, done)
            waits = self.kernel.between.waits * self.machine.second_level_latency / firsts
            consumer.last, consumer.time = None, done + self.stalls.between / firsts + waits
            if has_rows and product == firsts - 1:
                self.memory.serve(consumer.time, self.kernel.between.written / GROUPS)

    def write(self, block, consumer, step, done, has_rows):
        """A step of the second product: a stage is free when the store after it has been sent."""
        _, product, column = self.position(step)
        finished = done + self.stalls.second
        if has_rows:
            self.memory.serve(finished, self.kernel.products[product].written / GROUPS)
        if consumer.last:
            self.release(block, consumer.last[0], finished)
        consumer.last, consumer.time = (step, finished), finished
        if column == self.steps - 1:
            self.release(block, step, finished + 400)
            consumer.last = None


class Stalls(NamedTuple):
    """Cycles, as bench/hopper_stalls.py has them."""

    first: int
    second: int
    between: int


def stalls_told():
    """{(name, inner): Stalls} of the committed table."""
    row = re.compile(r"\| ([\w ]+) \| (\d+) \| \d \| (\d+) \| (\d+) \| (\d+) \|")
    found = row.findall((RESULTS / "hopper-stalls.md").read_text())
    return {(name, int(inner)): Stalls(*map(int, numbers)) for name, inner, *numbers in found}


def keeps_rows(kernel, rows):
    """Whether the second-level cache still has what is read again: half of its 50 MB are near to a multiprocessor."""
    again = sum(product.again for product in kernel.products) // TILE
    return again * rows * WIDTH * ELEMENT <= 25e6


# What a launch asks for: bytes as a `Product` names them, what lies between the products included; bytes of weights
# from the second-level cache; multiply-adds.
Asked = namedtuple("Asked", (*Product._fields, "weights", "products"))


def asked(kernel, rows):
    """Of whole tiles. The blocks of a cluster take as many turns, even with nothing left for some."""
    tiles, steps = -(-rows // ROWS), WIDTH // CHUNK
    turns = -(-tiles // kernel.cluster) * kernel.cluster
    copied, again, read, written = (tiles * steps * sum(bytes_) for bytes_ in zip(*kernel.products, strict=True))
    steps_of_all = turns * steps * len(kernel.products)
    return Asked(
        copied,
        again,
        read + tiles * kernel.between.read,
        written + tiles * kernel.between.written,
        steps_of_all * kernel.weights // kernel.cluster,
        steps_of_all * ROWS * CHUNK * kernel.inner,
    )


def floor(kernel, rows):
    """Microseconds for device memory, at least."""
    its = asked(kernel, rows)
    again = 0 if keeps_rows(kernel, rows) else its.again
    return (its.copied + again + its.read + its.written) / h200.MEMORY_SPEED / 1e3


def tensor_cores(kernel, rows):
    """Microseconds for the tensor cores, at their peak."""
    return asked(kernel, rows).products / 2048 / h200.MULTIPROCESSORS / h200.CLOCK


@cache
def lean_counts():
    """{name of a case: {rows: [entry]}} of the committed counts."""
    return {str(case): sizes for case, sizes in record.load()[1].items()}


def lean_bound(kernel, rows):
    """Microseconds that the lean kernels in its place take at least, by their counts; None: not counted."""
    entries = lean_counts().get(kernel.case, {}).get(rows, [])
    times = [max(entry["bounds"].values()) for entry in entries if entry["kernel"].startswith("sandwich<")]
    return sum(times) / 1000 if times else None


def modeled(kernel, rows, stalls):
    """{machine: microseconds}."""
    return {
        name: Simulation(kernel, stalls, rows, machine, keeps_rows(kernel, rows)).run()
        for name, machine in MACHINES.items()
    }


def lines():
    told = stalls_told()
    yield "| kernel | rows | stages | device memory | tensor cores | modeled, fast to slow | lean, at least |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for kernel in kernels():
        for rows in SIZES:
            times = modeled(kernel, rows, told[kernel.name, kernel.inner])
            lean = lean_bound(kernel, rows)
            yield (
                f"| {kernel.case} | {rows} | {kernel.stages} | {floor(kernel, rows):.1f} "
                f"| {tensor_cores(kernel, rows):.1f} | {times['fast']:.1f}-{times['slow']:.1f} "
                f"| {f'{lean:.1f}' if lean else '-'} |"
            )


def main():
    print("Modeled microseconds of the Hopper path's kernels, D = 768, bfloat16. NO GPU HAS CALIBRATED THIS MODEL.")
    print("Device memory and tensor cores are bounds; `lean` is the greatest bound by count of what is replaced.\n")
    print("\n".join(lines()))


if __name__ == "__main__":
    sys.exit(main())
