"""Measures how readable the sources are: `python tests/house/measure.py [FOLDER ...]`, without FOLDER those of moecalc.

Files that git tracks count; tests, examples and what others wrote (external, third_party) do not. Lengths of functions are
lizard's, identifiers and comments those of pygments' lexers.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import lizard
from pygments.lexers import CppLexer
from pygments.token import Comment, Literal, Name, Punctuation, _TokenType
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
CPP_SUFFIXES = {".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh", ".inl", ".tpp"}
LEFT_OUT = {"tests", "test", "examples", "external", "third_party", "benchmarks", "docs", "metatensor-torch"}
SHORT = 2  # letters


@dataclass
class Measures:
    """What is counted in some files."""

    lines: dict[Path, int] = field(default_factory=dict)  # of every file
    functions: list[tuple[int, str]] = field(default_factory=list)  # lines and place of every function
    identifiers: list[str] = field(default_factory=list)  # every occurrence
    comment_lines: int = 0
    code_lines: int = 0  # not empty, comments included
    chained: list[str] = field(default_factory=list)  # places of comma-chained statements

    @property
    def short_share(self) -> float:
        """Occurrences of identifiers of one or two letters, of all."""
        return sum(len(name) <= SHORT for name in self.identifiers) / max(1, len(self.identifiers))

    @property
    def comment_share(self) -> float:
        """Lines with a comment, of all that are not empty."""
        return self.comment_lines / max(1, self.code_lines)

    @property
    def longest_file(self) -> tuple[int, Path]:
        """Lines, and which."""
        return max((n, path) for path, n in self.lines.items())

    def function_length(self, share: float) -> int:
        """Lines of the function at this share of all, sorted by length."""
        lengths = sorted(length for length, _ in self.functions)
        return lengths[int(share * (len(lengths) - 1))]


def tracked(folder: Path, suffixes: set[str], *, everything: bool = False) -> list[Path]:
    """Source files below a folder, by git or, where there is none, as they lie there."""
    listed = subprocess.run(
        ["git", "-C", str(folder), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    paths = [folder / n for n in names if n] or [p for p in folder.rglob("*") if p.is_file()]
    return [
        p for p in paths
        if p.suffix in suffixes and p.is_file() and (everything or not LEFT_OUT & set(p.relative_to(folder).parts))
    ]  # fmt: skip


@lru_cache(maxsize=1000)
def tokens(text: str) -> list[tuple[int, _TokenType, str]]:
    """Line, kind and text of every token."""
    found, line = [], 1
    for kind, value in CppLexer(stripnl=False).get_tokens(text):
        found.append((line, kind, value))
        line += value.count("\n")
    return found


def _comment_lines(text: str) -> int:
    found = set()
    for line, kind, value in tokens(text):
        if kind in Comment and kind not in Comment.Preproc and kind not in Comment.PreprocFile:
            found |= {line + k for k, part in enumerate(value.split("\n")) if part.strip()}
    return len(found)


def chained_statements(text: str) -> list[int]:
    """Lines of statements with two or more assignments or initialisers that commas separate: `int a = 1, b = 2;`.

    Commas within brackets, template arguments and the heads of `for` loops do not count.
    """
    found: list[int] = []
    inside: list[str] = []
    start, parts, since_comma, angle = 1, 0, False, 0
    for line, kind, value in tokens(text):
        if kind in Comment or not value.strip():
            continue
        if value in "({[" and len(value) == 1:
            inside.append("{block" if value == "{" and not inside_brackets(inside) else value)
            if inside[-1] == "{block":
                parts, since_comma, start = 0, False, line
            continue
        if value in ")]}" and len(value) == 1:
            closed = inside.pop() if inside else ""
            if closed == "{block":
                parts, since_comma = 0, False
            continue
        if inside_brackets(inside):
            continue
        if value == ";":
            if parts > 1:
                found.append(start)
            parts, since_comma, angle = 0, False, 0
        elif value == "<" and kind not in Literal:
            angle += 1
        elif value == ">" and angle:
            angle -= 1
        elif value == "=" and angle == 0:
            if parts == 0:
                start, parts = line, 1
            elif since_comma:
                parts += 1
            since_comma = False
        elif value == "," and kind in Punctuation and parts:
            since_comma = True
    return found


def inside_brackets(inside: list[str]) -> bool:
    """Within parentheses, square brackets or the braces of an initialiser."""
    return any(opened != "{block" for opened in inside)


def measure_cpp(paths: list[Path], root: Path) -> Measures:
    """Everything of C++ and CUDA files."""
    result = Measures()
    for path in paths:
        text = path.read_text(errors="replace")
        result.lines[path.relative_to(root)] = text.count("\n")
        result.code_lines += sum(bool(line.strip()) for line in text.split("\n"))
        result.comment_lines += _comment_lines(text)
        result.identifiers += [v for _, kind, v in tokens(text) if kind in Name]
        result.chained += [f"{path.relative_to(root)}:{line}" for line in chained_statements(text)]
        analysed = lizard.analyze_file.analyze_source_code(str(path.with_suffix(".cpp")), text)
        result.functions += [
            (f.end_line - f.start_line + 1, f"{path.relative_to(root)}:{f.start_line} {f.name}")
            for f in analysed.function_list
        ]
    return result


def measure_python(paths: list[Path], root: Path) -> Measures:
    """Lengths of Python files and functions."""
    result = Measures()
    for path in paths:
        text = path.read_text(errors="replace")
        result.lines[path.relative_to(root)] = text.count("\n")
        analysed = lizard.analyze_file.analyze_source_code(str(path), text)
        result.functions += [
            (f.end_line - f.start_line + 1, f"{path.relative_to(root)}:{f.start_line} {f.name}")
            for f in analysed.function_list
        ]
    return result


def _column(folder: Path) -> list[str]:
    cpp = measure_cpp(tracked(folder, CPP_SUFFIXES), folder)
    python = measure_python(tracked(folder, {".py"}), folder)
    kernels = measure_cpp([folder / p for p in cpp.lines if "kernels" in p.parts], folder)
    cells = [
        f"{cpp.function_length(0.5)} / {cpp.function_length(0.9)}",
        f"{sum(n > 80 for n, _ in cpp.functions)} of {len(cpp.functions)}",
        "{} ({})".format(*cpp.longest_file),
        "{} ({})".format(*max(cpp.functions)),
        f"{cpp.short_share:.0%}" + (f" (kernels {kernels.short_share:.0%})" if kernels.lines else ""),
        f"{statistics.mean(map(len, cpp.identifiers)):.1f}",
        f"{cpp.comment_share:.0%}" + (f" (kernels {kernels.comment_share:.0%})" if kernels.lines else ""),
        f"{len(cpp.chained)}",
    ]
    if python.functions:
        cells += [
            f"{python.function_length(0.5)} / {python.function_length(0.9)}",
            "{} ({})".format(*python.longest_file),
        ]
    return cells


def main(folders: list[Path]) -> None:
    """Print one column per folder."""
    table = Table("", *(folder.resolve().name for folder in folders))
    rows = [
        "C++ function length, median / 90 %", "C++ functions over 80 lines", "longest C++ file", "longest C++ function",
        "C++ identifiers of 1 or 2 letters", "mean identifier length", "comment lines (C++)",
        "comma-chained statements", "Python function length, median / 90 %", "longest Python file",
    ]  # fmt: skip
    columns = [_column(folder) for folder in folders]
    for k, row in enumerate(rows):
        table.add_row(row, *(column[k] if k < len(column) else "" for column in columns))
    Console(width=200).print(table)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or [ROOT])
