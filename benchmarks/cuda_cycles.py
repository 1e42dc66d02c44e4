"""Lint of the kernels' machine code, and a model of their cycles; no GPU is needed, only `cuobjdump`.

python benchmarks/cuda_cycles.py LIBRARY [--arch sm_90] [--kernels Angle Edge] [--limits FILE | --write-limits FILE]

A table with a row per kernel, then a line per finding; the exit code is 1 if there is one. Cycles are of one warp
alone: every instruction waits for the scoreboards that the assembler wrote into it, then issues and stalls. Other
warps hide part of that, so compare the numbers before and after a change, and no more.

Columns: registers and spills; the longest loop that multiplies, once; what lies before that loop, since a barrier,
and after it, until one. The latter is the epilogue: its activations are the MUFU.EX2 on the path where no function is
called, since the activations that are called are rare ones.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
LONGEST_PATH = 5000
FEWEST_ACTIVATIONS = 4


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
    def inner_loops(self) -> list[list[Instruction]]:
        """Bodies of the loops that have none inside, by address."""
        ends = {
            (target, instruction.address)
            for instruction in self.code
            if (target := instruction.target) is not None and target < instruction.address
        }
        inner = [
            (first, last)
            for first, last in sorted(ends)
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in ends)
        ]
        return [[i for i in self.code if first <= i.address <= last] for first, last in inner]


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
    """Whether a loop is that of a product."""
    count = Counter(instruction.operation for instruction in body)
    return count["FFMA"] + count["DFMA"] >= 32 or count["HMMA"] > 0


def n_activations(passed: list[Instruction]) -> int:
    """Exponentials on a path."""
    return sum("MUFU.EX2" in instruction.text for instruction in passed)


def is_hot(body: list[Instruction]) -> bool:
    """Whether a loop multiplies or evaluates activations."""
    return multiplies(body) or n_activations(body) > 0


def findings(kernel: Kernel) -> Iterator[str]:
    """What should not be in a kernel."""
    for body in kernel.inner_loops:
        spilled = sum(instruction.operation in ("LDL", "STL") for instruction in body)
        if spilled and is_hot(body):
            yield f"{spilled} spills in the loop at {body[0].address:#x}"
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
    products = [body for body in kernel.inner_loops if multiplies(body)]
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
        "spills": count["LDL"] + count["STL"],
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
    if options.write_limits:
        options.write_limits.write_text(json.dumps(limits_of(rows), indent=1) + "\n")
    if options.limits:
        found += beyond(rows, json.loads(options.limits.read_text()))
    print(*found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
