"""Lint of the kernels' machine code, and a model of their cycles; no GPU is needed, only `cuobjdump`.

python benchmarks/cuda_cycles.py LIBRARY [--arch sm_90] [--kernels Angle Edge] [--limits FILE | --write-limits FILE]

A table with a row per kernel, then a line per finding; the exit code is 1 if there is one. Cycles are of one warp
alone: every instruction waits for the scoreboards that the assembler wrote into it, then issues and stalls. Other
warps hide part of that, so compare the numbers before and after a change, and no more.

Columns: registers and spills; the longest loop that multiplies, once; what lies before that loop, since a barrier,
and after it, until one. The latter is the epilogue: its activations are the MUFU.EX2 on the path where no function is
called, since the activations that are called are rare ones.

A second table has the milliseconds of a step: 10,000 atoms of water with the full-size dense model (n, e, a of 128, 64,
32, 6 layers) on an H100. A kernel's parts are found in its machine code (products, what lies before and after them,
staging, sums), `WORK` says how often a step runs them. A warp's cycles are divided by the warps that share its
scheduler; but a scheduler issues one instruction a cycle, a quarter of the special functions' results, its tensor core
multiplies at its rate, and memory moves what it must: the longest of these counts. Small kernels are not modelled
(REST). Expect +-40 %: no GPU has run this.

A limits file has the most that every kernel may have of every number. `--write-limits` writes one, 5 % above what is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Latencies in cycles, of memory as where the data is in the first-level cache.
LATENCY = {
    "LDS": 30,
    "LDSM": 33,
    "LDG": 42,
    "LDL": 42,
    "LDC": 28,
    "MUFU": 20,
    "I2F": 20,
    "F2I": 20,
    "F2F": 20,
    "S2R": 25,
    "HMMA": 18,
}
OTHER_LATENCY = 12
READ_LATENCY = 12  # until the operands of a store may be overwritten
JUMP = 8
N_SCOREBOARD = 6
Row = dict[str, str | int | float]
# What a limits file has; spills are findings of their own where they matter.
LIMITED = ("KiB", "registers", "product cycles", "start cycles", "epilogue cycles")
ROOM = 1.05
MOST_BYTES = 512 << 10  # of one kernel's code
FIRST_LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);\s+/\* (0x[0-9a-f]{16}) \*/")
SECOND_LINE = re.compile(r"\s+/\* (0x[0-9a-f]{16}) \*/")
BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
PREDICATE = re.compile(r"@!?U?P[T\d]+ ")
KERNEL = re.compile(r"run_kernelINS\d*_(\d+)(\w+)")
SWITCH = re.compile(r"ELb([01])E")
FORMAT = re.compile(r"kernels_(\w+?)_cu")
HMMA = re.compile(r"HMMA\.(1688|16816)\.F32\.?(TF32)?")
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
LONGEST_PATH = 5000
FEWEST_ACTIVATIONS = 4

# An H100.
CLOCK = 1.755e9
N_MULTIPROCESSOR = 132
N_SCHEDULER = 4
MEMORY_RATE = 3.35e12
REGISTERS = 65536
SHARED_BYTES = 227 << 10
SHARED_OF_BLOCK = 1 << 10  # that the driver keeps of every block
SPECIAL_FUNCTION = 8  # cycles in which a scheduler's warp gets 32 results
# Multiplications per cycle of a scheduler's tensor core, of which mma.sync is taken to reach 62 %, and those of an
# instruction.
TENSOR_RATE = {"TF32": 256 * 0.62, "": 512 * 0.62}
TENSOR_SIZE = {"1688": 1024, "16816": 2048}
THREADS = 128
TILE = 64  # rows
# Water at 0.1 atoms per cubic Angstrom, cutoffs of 6 and 4 Angstrom: numbers per atom.
N_ATOM = 10_000
EDGES = 84
CLOSE = 26
ANGLES = 696
# Finding the rows of a tile: searches, a division and loads that wait for each other.
TILE_CYCLES = 500
TILE_INSTRUCTIONS = 150
REST = 6.6  # ms of the small kernels, as estimated by hand from the first ones
MOST_THREADS = 2048  # of a multiprocessor
N_LAUNCH = 170
LAUNCH = 1e-3  # ms between two kernels


@dataclass(frozen=True)
class Instruction:
    """One instruction, with what the assembler decided about its schedule."""

    address: int
    text: str
    stall: int
    sets_write: int  # scoreboard that it clears with its result; 7: none
    sets_read: int  # scoreboard that it clears when its operands were read; 7: none
    waits: int  # mask of scoreboards

    @cached_property
    def is_predicated(self) -> bool:
        """Whether only some lanes, or none, may run it."""
        return PREDICATE.match(self.text) is not None

    @cached_property
    def operation(self) -> str:
        """Its name without modifiers: `FFMA`."""
        return PREDICATE.sub("", self.text, count=1).split()[0].split(".")[0]

    @property
    def target(self) -> int | None:
        """Address that a branch goes to."""
        found = BRANCH.search(self.text)
        return int(found[1], 16) if found else None

    @property
    def latency(self) -> int:
        """Cycles until its result is there."""
        return LATENCY.get(self.operation, OTHER_LATENCY)


@dataclass(frozen=True)
class Kernel:
    """The machine code of a kernel for one architecture."""

    name: str
    architecture: str
    code: list[Instruction]

    @property
    def bytes(self) -> int:
        """Size of its code."""
        return 16 * len(self.code)

    @cached_property
    def loops(self) -> list[list[Instruction]]:
        """Bodies of the loops, by address."""
        ends = {
            (target, instruction.address)
            for instruction in self.code
            if (target := instruction.target) is not None and target < instruction.address
        }
        return [[i for i in self.code if first <= i.address <= last] for first, last in sorted(ends)]

    @cached_property
    def inner_loops(self) -> list[list[Instruction]]:
        """Those that have none inside."""
        return innermost(self.loops)


def is_within(loop: list[Instruction], body: list[Instruction]) -> bool:
    """Whether a loop lies in another one, or is that."""
    return body[0].address <= loop[0].address and loop[-1].address <= body[-1].address


def innermost(loops: list[list[Instruction]]) -> list[list[Instruction]]:
    """The loops in which none of the others lies."""
    return [body for body in loops if not any(loop is not body and is_within(loop, body) for loop in loops)]


def instruction_of(first: re.Match[str], second: re.Match[str]) -> Instruction:
    """The control bits are the upper 23 of 128: stall, yield, the scoreboards that it sets, and those it waits for."""
    control = int(second[1], 16) >> 41
    return Instruction(
        address=int(first[1], 16),
        text=first[2].strip(),
        stall=control & 15,
        sets_write=control >> 5 & 7,
        sets_read=control >> 8 & 7,
        waits=control >> 11 & 63,
    )


def shown_name(symbol: str) -> str:
    """`AngleForward float32` of a mangled kernel, `Nodes<1> float32` of one with a switch; other symbols as they are."""
    found = KERNEL.search(symbol)
    if found is None:
        return symbol
    length = int(found[1])
    switch = SWITCH.search(found[2][length:])
    of_format = FORMAT.search(symbol)
    return (
        found[2][:length] + (f"<{switch[1]}>" if switch else "") + (f" {of_format[1]}" if of_format else "")
    )


def kernels_of(lines: Iterable[str]) -> Iterator[Kernel]:
    """The kernels of what `cuobjdump --dump-sass` writes."""
    symbol = architecture = ""
    code: list[Instruction] = []
    held: re.Match[str] | None = None
    for line in lines:
        if "Function : " in line:
            if code:
                yield Kernel(shown_name(symbol), architecture, code)
            symbol, code, held = line.split("Function : ")[1].strip(), [], None
        elif line.startswith("arch = "):
            if code:
                yield Kernel(shown_name(symbol), architecture, code)
            architecture, code, held = line.split("=")[1].strip(), [], None
        elif first := FIRST_LINE.match(line):
            held = first
        elif held is not None and (second := SECOND_LINE.match(line)):
            code.append(instruction_of(held, second))
            held = None
    if code:
        yield Kernel(shown_name(symbol), architecture, code)


def cycles(body: list[Instruction], rounds: int = 8) -> float:
    """Cycles of one round of a loop, with no other warp beside it; branches inside are not taken."""
    time = 0
    ready = [0] * N_SCOREBOARD
    for _ in range(rounds):
        for instruction in body:
            waited = [ready[k] for k in range(N_SCOREBOARD) if instruction.waits >> k & 1]
            time = max([time, *waited])
            if instruction.sets_write < N_SCOREBOARD:
                ready[instruction.sets_write] = max(ready[instruction.sets_write], time + instruction.latency)
            if instruction.sets_read < N_SCOREBOARD:
                ready[instruction.sets_read] = max(ready[instruction.sets_read], time + READ_LATENCY)
            time += max(1, instruction.stall)
        time += JUMP
    return max([time, *ready]) / rounds


def multiplies(body: list[Instruction]) -> bool:
    """Whether a loop is that of a product; one of activations has as many multiplications."""
    count = Counter(instruction.operation for instruction in body)
    is_product = count["FFMA"] + count["DFMA"] >= 32 or count["HMMA"] > 0
    return is_product and not n_activations(body)


def is_dense(body: list[Instruction]) -> bool:
    """Whether a loop multiplies a tile with weights, and not a few vectors with each other."""
    count = Counter(instruction.operation for instruction in body)
    return count["HMMA"] > 0 or 2 * (count["FFMA"] + count["DFMA"]) >= len(body)


def n_activations(passed: list[Instruction]) -> int:
    """Exponentials on a path."""
    return sum("MUFU.EX2" in instruction.text for instruction in passed)


def is_hot(body: list[Instruction]) -> bool:
    """Whether a loop multiplies or evaluates activations."""
    return multiplies(body) or n_activations(body) > 0


def spills(code: list[Instruction]) -> int:
    """Loads and stores of spilled registers."""
    return sum(instruction.operation in ("LDL", "STL") for instruction in code)


def findings(kernel: Kernel) -> Iterator[str]:
    """What should not be in a kernel."""
    for body in kernel.inner_loops:
        if spills(body) and is_hot(body):
            yield f"{spills(body)} spills in the loop at {body[0].address:#x}"
    predicated = sum(i.operation == "HMMA" and i.is_predicated for i in kernel.code)
    if predicated:
        yield f"{predicated} predicated HMMA: lanes that leave would hang or spoil the product"
    if kernel.bytes > MOST_BYTES:
        yield f"expected at most {MOST_BYTES >> 10} KiB of code, got {kernel.bytes >> 10}"


def path(kernel: Kernel, first: int) -> list[Instruction]:
    """Instructions from an index on that run where no function is called, up to a barrier, a jump back or the end."""
    code, index = kernel.code, first
    passed: list[Instruction] = []
    while index < len(code) and len(passed) < LONGEST_PATH:
        instruction = code[index]
        if instruction.operation in ("BAR", "EXIT", "RET"):
            break
        passed.append(instruction)
        index += 1
        target = instruction.target
        if instruction.operation != "BRA" or target is None:
            continue
        if target <= instruction.address:
            break
        skipped = code[index : target // 16]
        calls = any(i.operation == "CALL" for i in skipped) and not n_activations(skipped)
        if calls or not instruction.is_predicated:
            index = target // 16
    return passed


def start_of(kernel: Kernel, body: list[Instruction]) -> list[Instruction]:
    """What runs before a loop since the barrier or the jump before it."""
    loop = body[0].address // 16
    first = loop
    while first > 0 and kernel.code[first - 1].operation not in ("BAR", "EXIT", "RET"):
        target = kernel.code[first - 1].target
        if target is not None and target <= kernel.code[first - 1].address:
            break
        first -= 1
    return [i for i in path(kernel, first) if i.address < body[0].address]


def row_of(kernel: Kernel, registers: int = 0) -> Row:
    """A row of the table."""
    count = Counter(instruction.operation for instruction in kernel.code)
    multiplying = [body for body in kernel.inner_loops if multiplies(body)]
    products = [body for body in multiplying if is_dense(body)] or multiplying
    longest = max(products, key=len, default=[])
    starts = [start_of(kernel, body) for body in products]
    ends = [path(kernel, body[-1].address // 16 + 1) for body in products]
    epilogues = [end for end in ends if n_activations(end) >= FEWEST_ACTIVATIONS]
    start = max(starts, key=lambda passed: cycles(passed, 1), default=[])
    epilogue = max(epilogues, key=lambda passed: cycles(passed, 1), default=[])
    activations = n_activations(epilogue)
    return {
        "kernel": kernel.name,
        "KiB": kernel.bytes >> 10,
        "registers": registers,
        "spills": spills(kernel.code),
        "HMMA": count["HMMA"],
        "product instr": len(longest),
        "product cycles": round(cycles(longest)) if longest else 0,
        "start cycles": round(cycles(start, 1)) if start else 0,
        "epilogue instr": len(epilogue),
        "epilogue cycles": round(cycles(epilogue, 1)) if epilogue else 0,
        "activations": activations,
        "instr each": round(len(epilogue) / activations, 1) if activations else 0,
    }


def limits_of(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Numbers of every kernel that has products, with some room above them."""
    return {
        str(row["kernel"]): {
            name: math.ceil(float(row[name]) * ROOM) for name in LIMITED if float(row[name]) > 0
        }
        for row in rows
        if row["product instr"]
    }


def beyond(rows: list[Row], limits: dict[str, dict[str, int]]) -> Iterator[str]:
    """What exceeds its limit; a number that the limits do not name may only be 0. Formats without limits pass."""
    formats = {name.rpartition(" ")[2] for name in limits}
    for row in rows:
        name = str(row["kernel"])
        allowed = limits.get(name)
        if allowed is None:
            if row["product instr"] and name.rpartition(" ")[2] in formats:
                yield f"{name}: expected limits of this kernel, got none: add them with --write-limits"
            continue
        for what in LIMITED:
            if float(row[what]) > allowed.get(what, 0):
                yield f"{name}: expected at most {allowed.get(what, 0)} for '{what}', got {row[what]}"


@dataclass(frozen=True)
class Cost:
    """Of one warp: cycles if it is alone, instructions, special functions among them, and cycles of tensor cores."""

    cycles: float = 0.0
    instructions: float = 0.0
    special: float = 0.0
    tensor: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.cycles + other.cycles,
            self.instructions + other.instructions,
            self.special + other.special,
            self.tensor + other.tensor,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.cycles * times, self.instructions * times, self.special * times, self.tensor * times)


def shapes_of(passed: list[Instruction]) -> list[tuple[str, str]]:
    """Shape of every instruction of tensor cores, and `TF32` or nothing."""
    return [
        (found[1], found[2] or "")
        for instruction in passed
        if (found := HMMA.search(instruction.text)) is not None
    ]


def cost_of(passed: list[Instruction], rounds: int = 1) -> Cost:
    """Cost of a path, or of one round of a loop."""
    special = sum(instruction.operation == "MUFU" for instruction in passed)
    tensor = sum(TENSOR_SIZE[shape] / TENSOR_RATE[kind] for shape, kind in shapes_of(passed))
    return Cost(cycles(passed, rounds), len(passed), special, tensor) if passed else Cost()


def longest_of(costs: Iterable[Cost]) -> Cost:
    """The one with most cycles."""
    return max(costs, key=lambda cost: cost.cycles)


def mean_of(costs: list[Cost]) -> Cost:
    """Their mean."""
    return sum(costs, Cost()) * (1 / len(costs))


@dataclass(frozen=True)
class Loop:
    """A loop that multiplies, with what runs before and after it."""

    body: list[Instruction]
    before: Cost
    after: Cost
    activations: int
    products: int  # of tensor cores, for one of float32

    @property
    def product(self) -> Cost:
        """Cost of multiplying a tile by one row of 64 weights: 32 multiplications of each thread."""
        return cost_of(self.body, 8) * (32 / multiplications(self.body, self.products))


def multiplications(body: list[Instruction], products: int) -> int:
    """Of each thread; products of split factors count as the one that they replace."""
    count = Counter(instruction.operation for instruction in body)
    return count["FFMA"] + sum(TENSOR_SIZE[shape] // 32 for shape, _ in shapes_of(body)) // products


class Parts:
    """What a kernel's machine code does with a tile, part by part."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.products = 3 if kernel.name.endswith("x3") else 1
        inner = kernel.inner_loops
        self.loops = [self._loop(body) for body in inner if multiplies(body) and is_dense(body)]
        self.others = [body for body in inner if not multiplies(body)]

    def _loop(self, body: list[Instruction]) -> Loop:
        after = path(self.kernel, body[-1].address // 16 + 1)
        return Loop(
            body, cost_of(start_of(self.kernel, body)), cost_of(after), n_activations(after), self.products
        )

    def activated(self, columns: int, inputs: int) -> Cost:
        """A tile of `columns` (64 or 32) with product and activations; without product where inputs is 0."""
        number = columns // 2
        if inputs == 0:
            straight = [passed for passed in self._straight() if n_activations(passed) == number]
            self._expect(straight, f"a path with {number} activations")
            return longest_of(cost_of(passed) for passed in straight)
        chosen = [loop for loop in self.loops if loop.activations == number]
        self._expect(chosen, f"a product before {number} activations")
        before = longest_of(loop.before for loop in chosen)
        after = longest_of(loop.after for loop in chosen)
        return before + mean_of([loop.product for loop in chosen]) * (inputs * columns / 64) + after

    def plain(self, columns: int, inputs: int) -> Cost:
        """The same without activations."""
        chosen = [loop for loop in self.loops if loop.activations < FEWEST_ACTIVATIONS]
        self._expect(chosen, "a product without activations")
        around = mean_of([loop.before + loop.after for loop in chosen])
        return around + mean_of([loop.product for loop in chosen]) * (inputs * columns / 64)

    def staged(self, vectors: float) -> Cost:
        """Vectors of four numbers that every thread copies to shared memory."""
        costs = []
        for body in self.others:
            count = Counter(instruction.operation for instruction in body)
            if count["LDG"] and count["STS"]:
                costs.append(cost_of(body, 8) * (1 / count["STS"]))
        self._expect(costs, "a loop that stages")
        return mean_of(costs) * vectors

    def summed(self, serial: float, rows: float) -> Cost:
        """Sums over rows of a tile: `serial` after one another, `rows` by every warp."""
        costs = []
        for body in self.others:
            count = Counter(instruction.operation for instruction in body)
            if count["LDS"] and count["FADD"] and not count["STS"] and not count["LDG"]:
                costs.append(cost_of(body, 8) * (1 / count["LDS"]))
        self._expect(costs, "a loop that sums")
        mean = mean_of(costs)
        return Cost(mean.cycles * serial, mean.instructions * rows)

    def per(self, operation: str, has: Iterable[str], lacks: Iterable[str] = ()) -> Cost:
        """For one of an operation: the mean of the loops that have some operations and lack others."""
        costs = []
        for body in self.kernel.inner_loops:
            count = Counter(instruction.operation for instruction in body)
            if multiplies(body) and is_dense(body):
                continue
            if all(count[name] for name in (operation, *has)) and not any(count[name] for name in lacks):
                costs.append(cost_of(body, 8) * (1 / count[operation]))
        self._expect(costs, f"a loop with {operation}, {', '.join(has)}")
        return mean_of(costs)

    def sliced(self) -> Cost:
        """64 rows by 64 inputs, staged, times 64 columns: a loop with two barriers."""
        slices = innermost([body for body in self.kernel.loops if self._is_slice(body)])
        self._expect(slices, "a loop that stages slices and multiplies them")
        return mean_of([self._slice(body) for body in slices])

    def _inside(self, body: list[Instruction]) -> list[list[Instruction]]:
        return [loop for loop in self.kernel.inner_loops if is_within(loop, body)]

    def _is_slice(self, body: list[Instruction]) -> bool:
        count = Counter(instruction.operation for instruction in body)
        products = count["HMMA"] or any(multiplies(loop) for loop in self._inside(body))
        return count["BAR"] == 2 and bool(products)

    def _slice(self, body: list[Instruction]) -> Cost:
        """Its straight part, the loop that stages, and that of the product where it is not unrolled."""
        total, inside = Cost(), set[int]()
        for loop in self._inside(body):
            inside |= {instruction.address for instruction in loop}
            count = Counter(instruction.operation for instruction in loop)
            if multiplies(loop):
                total += cost_of(loop, 8) * (2048 / multiplications(loop, self.products))
            elif count["STS"]:
                total += cost_of(loop, 8) * (8 / count["STS"])
        return total + cost_of([instruction for instruction in body if instruction.address not in inside])

    def _expect(self, found: list[Any], what: str) -> None:
        if not found:
            raise ValueError(f"{self.kernel.name}: expected {what} in the machine code, got none")

    def _straight(self) -> Iterator[list[Instruction]]:
        """Paths that begin after a barrier or a jump, or where one goes to, and loops over experts."""
        code = self.kernel.code
        starts = {instruction.target for instruction in code}
        yield from self.others
        for index in range(1, len(code)):
            if code[index - 1].operation in ("BAR", "BRA") or code[index].address in starts:
                yield path(self.kernel, index)


@dataclass(frozen=True)
class Work:
    """What a step does with the tiles of a kind of rows. Passes: parts of a kernel to their cost."""

    rows: float  # of the step
    passes: Callable[[Parts], Cost]
    bytes: float = 0.0  # that a row moves from and to memory


def first_sums(parts: Parts) -> Cost:
    """Angles to their first edges: as many in a row as a centre has close edges."""
    return parts.summed(CLOSE, TILE / N_SCHEDULER)


def second_sums(parts: Parts) -> Cost:
    """Angles to their second edges."""
    return parts.summed(10, 10)


def edge_sums(parts: Parts) -> Cost:
    """Edges to their centre."""
    return parts.summed(TILE, TILE / N_SCHEDULER)


def projected(parts: Parts) -> Cost:
    """Both sides of the parts of close edges in the angle maps."""
    return (parts.plain(64, 64) + parts.plain(32, 64) + parts.staged(16)) * 2


def angle_forward(inputs: int, live: float) -> Callable[[Parts], Cost]:
    """A tile of angles; `live`: share of the layers that have an angle map."""

    def passes(parts: Parts) -> Cost:
        message = parts.activated(64, inputs) + first_sums(parts)
        message += parts.staged(inputs / 8) if inputs else Cost()
        return message + parts.activated(32, inputs) * live

    return passes


def angle_backward(inputs: int, live: float) -> Callable[[Parts], Cost]:
    """The same backward."""

    def passes(parts: Parts) -> Cost:
        sums = first_sums(parts) + second_sums(parts)
        message = parts.activated(64, inputs) + sums
        update = parts.activated(32, inputs) + sums
        if inputs:
            message += parts.staged(inputs / 4) + parts.plain(32, 64)
            update += parts.plain(32, 32)
        return message + update * live

    return passes


def angles_to_edges(parts: Parts) -> Cost:
    """Gradients of close edges."""
    return projected(parts) + (parts.plain(64, 96) + parts.staged(12)) * 2


def edge_forward(parts: Parts) -> Cost:
    """A tile of edges: two chunks of messages, one of the update."""
    messages = (parts.activated(64, 64) + edge_sums(parts)) * 2
    return parts.staged(8) + messages + parts.activated(64, 64) * (5 / 6)


def edge_backward(parts: Parts) -> Cost:
    """The same backward; 24 vectors for the gradients of the directions."""
    chunk = parts.activated(64, 64) + parts.plain(64, 64) + edge_sums(parts)
    return parts.staged(16 + 24) + chunk * (2 + 5 / 6)


def message_forward(parts: Parts) -> Cost:
    """A tile of messages of angles, with EdgeForward."""
    return parts.staged(8) + parts.activated(64, 64)


def message_backward(parts: Parts) -> Cost:
    """The same backward."""
    return parts.staged(16) + parts.activated(64, 64) + parts.plain(64, 64)


# By kernel: bytes of shared memory of a block, estimate by hand of the first kernels in ms, and the work. Layer 0 has the
# kernels <1>, layers 1 to 4 have angles, of which 1 to 3 have an angle map, and layer 5 has edges only.
KERNELS: dict[str, tuple[int, float, list[Work]]] = {
    "AngleForward<0>": (
        28_400,
        15.7 * 4 / 5,
        [Work(4 * ANGLES, angle_forward(32, 3 / 4), 128 + 96 + 4), Work(4 * CLOSE, projected, 768)],
    ),
    "AngleForward<1>": (
        20_200,
        15.7 / 5,
        [Work(ANGLES, angle_forward(0, 1), 128 + 8), Work(CLOSE, projected, 768)],
    ),
    "AngleBackward<0>": (
        42_000,
        31.8 * 4 / 5,
        [Work(4 * ANGLES, angle_backward(32, 3 / 4), 256 + 96 + 8), Work(4 * CLOSE, angles_to_edges, 2048)],
    ),
    "AngleBackward<1>": (
        29_000,
        31.8 / 5,
        [Work(ANGLES, angle_backward(0, 1), 128 + 16), Work(CLOSE, angles_to_edges, 2048)],
    ),
    "EdgeForward": (
        35_800,
        6.9,
        [Work(6 * EDGES, edge_forward, 512), Work(5 * CLOSE, message_forward, 768)],
    ),
    "EdgeBackward": (57_800, 11.0 * 0.9, [Work(6 * EDGES, edge_backward, 768 + 768 + 64)]),
    "MessageBackward": (53_200, 11.0 * 0.1, [Work(5 * CLOSE, message_backward, 768)]),
}
# Per atom: slots; columns of edge and angle maps; moments and invariants of a node.
SLOTS = 2
EDGE_COLUMNS = 192
MOMENTS = 3 * 192
INVARIANTS = 768


@dataclass(frozen=True)
class Small:
    """What a step does with the blocks of a kernel that has no tiles of edges or angles."""

    blocks: float  # of the step, per atom
    threads: int
    passes: Callable[[Parts], Cost]  # of the warp that takes longest
    bytes: float  # that a block moves from and to memory
    busy: float = 1.0  # share of its instructions that the mean warp has


def slices(number: float) -> Callable[[Parts], Cost]:
    """As many slices of a product."""
    return lambda parts: parts.sliced() * number


def slot_sums(parts: Parts) -> Cost:
    """The edges of a slot: gradients of pre-activations, and three moments of each."""
    edges = EDGES / SLOTS
    sums, moments = parts.per("LDG", ("FADD", "LDS")), parts.per("LDG", ("FFMA", "LDS"))
    return sums * edges + moments * (3 * edges)


def invariants_backward(parts: Parts) -> Cost:
    """4.5 moments of a thread as right factors of 4 rows; 128 columns of a left factor."""
    return parts.per("LDG", ("FFMA", "CALL")) * (8 * 4.5) + parts.per("LDG", ("FFMA",), ("CALL",)) * 256


def geometry_backward(parts: Parts) -> Cost:
    """An edge of every thread: 64 features, and the angles at both of its sides; the centre's sums."""
    features = parts.per("MUFU", ("LDG", "FFMA")) * 128
    angles = parts.per("LDG", ("DFMA", "DADD"), ("MUFU",)) * (2 * 8 * CLOSE)
    return features + angles + parts.per("LDG", ("DADD", "DMUL"), ("DFMA",)) * (3 * EDGES)


# Rows in tiles of 64, columns in chunks of 64. Linear: 11 blocks of 21 slices that project nodes, twice in each of six
# layers; 24 slices in 12 blocks to the invariants; 25 in 8 to nodes and slots, in five.
SMALL: dict[str, Small] = {
    "Linear": Small(252 / TILE, THREADS, slices(521 / 252), 70e3 * TILE / 252),
    "Nodes<0>": Small(12 / TILE, THREADS, slices(14), 2300 * TILE),
    "Nodes<1>": Small(12 / TILE, THREADS, slices(14), 2300 * TILE),
    "FittingForward": Small(12 / TILE, THREADS, slices(40 / 12), 2000 * TILE / 4),
    "FittingBackward": Small(10 / TILE, THREADS, slices(4), 2000 * TILE / 4),
    "Symmetrize": Small(
        6, 64, lambda parts: parts.per("LDG", ("FFMA", "LDS")) * EDGES, EDGES * (256 + 16) + 4 * MOMENTS
    ),
    "SlotSums": Small(
        5 * SLOTS, THREADS, slot_sums, EDGES / SLOTS * (4 * EDGE_COLUMNS + 24) + 1280, busy=1 / 2
    ),
    "GatherSlots": Small(5 / 4, THREADS, lambda parts: parts.per("LDG", ("FADD",)) * (4 * SLOTS), 8192),
    "Invariants": Small(
        12, THREADS, lambda parts: parts.per("STG", ("FFMA",)) * 6, 4 * (MOMENTS + INVARIANTS)
    ),
    "InvariantsBackward": Small(6, THREADS, invariants_backward, 4 * (2 * MOMENTS + INVARIANTS)),
    "GeometryBackward": Small(1, THREADS, geometry_backward, EDGES * 600 + ANGLES * 16),
    "PlaceEdges": Small(1, THREADS, lambda parts: parts.per("STG", ("DFMA", "MUFU")) * 23, EDGES * 150),
    "PlaceAngles": Small(1, THREADS, lambda parts: parts.per("STG", ("DFMA",)) * 11, ANGLES * 8),
    "Embed": Small(1, THREADS, lambda parts: parts.per("STG", ("MUFU", "FADD")) * 42, EDGES * 256),
}
FORMATS = ("float32", "tf32x3", "bf16x3", "tf32", "fp16")


def blocks_of(registers: int, shared: int = 0, threads: int = THREADS) -> int:
    """Blocks that share a multiprocessor."""
    of_registers = REGISTERS // (math.ceil(max(registers, 1) / 8) * 8 * threads)
    return min(of_registers, SHARED_BYTES // (shared + SHARED_OF_BLOCK), MOST_THREADS // threads)


def milliseconds(kernel: Kernel, work: list[Work], blocks: int) -> float:
    """Of a step."""
    parts = Parts(kernel)
    total = 0.0
    for item in work:
        tile = item.passes(parts) + Cost(TILE_CYCLES, TILE_INSTRUCTIONS)
        waited = max(tile.cycles / blocks, tile.instructions, tile.special * SPECIAL_FUNCTION, tile.tensor)
        tiles = N_ATOM * item.rows / TILE
        moved = N_ATOM * item.rows * item.bytes / MEMORY_RATE
        # four warps of a tile, one on each scheduler
        total += max(tiles * waited / (N_MULTIPROCESSOR * CLOCK), moved)
    return 1e3 * total


def small_milliseconds(kernel: Kernel, small: Small, blocks: int) -> float:
    """Of a step."""
    cost = small.passes(Parts(kernel))
    warps = small.threads / 32 / N_SCHEDULER
    issued = max(cost.instructions, cost.special * SPECIAL_FUNCTION, cost.tensor) * small.busy * warps
    number = N_ATOM * small.blocks
    computed = number * max(cost.cycles / blocks, issued) / (N_MULTIPROCESSOR * CLOCK)
    return 1e3 * max(computed, number * small.bytes / MEMORY_RATE)


def step_row(name: str, milliseconds: float, **others: str | float) -> Row:
    """A row of the table of a step; what is not given stays empty."""
    columns = ("registers", "spills", "shared KB", "blocks", "ms", "first estimate")
    values = {"ms": round(milliseconds, 2), **others}
    return {"kernel of a step": name, **{column: values.get(column, "") for column in columns}}


def step_rows(kernels: list[Kernel], registers: dict[str, int]) -> list[Row]:
    """The table of a step, with its sum for every format of which all kernels are there."""
    by_name = {kernel.name: kernel for kernel in kernels}
    rows: list[Row] = []
    for number_format in FORMATS:
        if not all(f"{name} {number_format}" in by_name for name in (*KERNELS, *SMALL)):
            continue
        of_format: list[Row] = []
        for name in (*KERNELS, *SMALL):
            kernel = by_name[f"{name} {number_format}"]
            of_format.append(kernel_row(name, kernel, registers.get(kernel.name, 0)))
        rows += [*of_format, *sums_of(number_format, of_format)]
    return rows


def kernel_row(name: str, kernel: Kernel, registers: int) -> Row:
    """The row of a kernel in the table of a step."""
    shown: Row = {"registers": registers, "spills": spills(kernel.code)}
    if name in SMALL:
        blocks = blocks_of(registers, threads=SMALL[name].threads)
        return step_row(kernel.name, small_milliseconds(kernel, SMALL[name], blocks), blocks=blocks, **shown)
    shared, before, work = KERNELS[name]
    blocks = blocks_of(registers, shared)
    shown |= {"shared KB": round(shared / 1e3, 1), "first estimate": round(before, 1)}
    return step_row(kernel.name, milliseconds(kernel, work, blocks), blocks=blocks, **shown)


def sums_of(number_format: str, rows: list[Row]) -> Iterator[Row]:
    """The time between kernels, the step, and its time per atom."""
    before = sum(float(row["first estimate"] or 0.0) for row in rows) + REST
    time = sum(float(row["ms"]) for row in rows) + N_LAUNCH * LAUNCH
    yield step_row(f"launches {number_format}", N_LAUNCH * LAUNCH)
    yield step_row(f"step {number_format}", time, **{"first estimate": round(before, 1)})
    per_atom = 1e3 / N_ATOM
    yield step_row(
        f"us per atom {number_format}", time * per_atom, **{"first estimate": round(before * per_atom, 2)}
    )


def shown_table(rows: list[Row]) -> str:
    """The rows in columns."""
    if not rows:
        return ""
    lines = [[*rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            f"{text:<{w}}" if k == 0 else f"{text:>{w}}"
            for k, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def run_cuobjdump(options: argparse.Namespace, *flags: str) -> str:
    """What cuobjdump writes about the library; its warnings are left out."""
    command = [options.cuobjdump, *flags, "-arch", options.arch, str(options.library)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout


def registers_of(resources: str) -> dict[str, int]:
    """Registers of kernels by name, of what `cuobjdump --dump-resource-usage` writes."""
    return {shown_name(symbol): int(registers) for symbol, registers, _ in RESOURCES.findall(resources)}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Options; ends with a message where cuobjdump or the library is missing."""
    parser = argparse.ArgumentParser(description="lint and cycle model of the CUDA kernels' machine code")
    parser.add_argument("library", type=Path, help="libmoecalc_cuda.so, an object file or a cubin")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument(
        "--kernels", nargs="+", default=[], help="only those with one of these in their names"
    )
    parser.add_argument("--cuobjdump", default=shutil.which("cuobjdump"))
    parser.add_argument("--limits", type=Path, help="file with the most that kernels may have")
    parser.add_argument("--write-limits", type=Path, help="file to write them to")
    options = parser.parse_args(arguments)
    if options.cuobjdump is None:
        parser.error(
            "expected cuobjdump on the PATH, got none: name it with --cuobjdump; it is part of CUDA's toolkit"
        )
    if not options.library.exists():
        parser.error(f"{options.library}: no such file: build moecalc with MOECALC_CUDA=1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the findings; the exit code is 1 if there are any, 2 if there are no kernels."""
    options = parsed(arguments)
    chosen = [
        kernel
        for kernel in kernels_of(run_cuobjdump(options, "--dump-sass").splitlines())
        if not options.kernels or any(word in kernel.name for word in options.kernels)
    ]
    if not chosen:
        print(f"expected kernels for {options.arch} in {options.library}, got none", file=sys.stderr)
        return 2
    registers = registers_of(run_cuobjdump(options, "--dump-resource-usage"))
    rows = [row_of(kernel, registers.get(kernel.name, 0)) for kernel in chosen]
    rows.sort(key=lambda row: str(row["kernel"]))
    print(shown_table(rows))
    found = [f"{kernel.name}: {what}" for kernel in chosen for what in findings(kernel)]
    try:
        print("\n" + shown_table(step_rows(chosen, registers)))
    except ValueError as error:
        found.append(str(error))
    if options.write_limits:
        options.write_limits.write_text(json.dumps(limits_of(rows), indent=1) + "\n")
    if options.limits:
        found += beyond(rows, json.loads(options.limits.read_text()))
    print(*found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
