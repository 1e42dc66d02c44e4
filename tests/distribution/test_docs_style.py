"""Documentation is plain to read: short lines, one spelling, links that lead somewhere, names that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 100
LEFT_OUT = {"build", "dist", "venv"}  # made, not written
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in LEFT_OUT for part in path.relative_to(ROOT).parts)
)
TOUR = "docs/developer/tour.md"
# results of benchmarks/peers/compare.py, as it writes them
GENERATED = re.compile(r"<!-- results of .*: begin -->.*?<!-- results of .*: end -->", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> list[tuple[int, str]]:
    """Number and text of the lines that are neither code, nor table, nor generated."""
    hidden = GENERATED.sub(lambda match: "\n" * match[0].count("\n"), text)
    lines, fenced = [], False
    for number, line in enumerate(hidden.split("\n"), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("|", "    ")):
            lines.append((number, line))
    return lines


def too_long(line: str) -> bool:
    """Whether a line could be shorter: one word, such as a link or code, cannot be broken."""
    words = re.sub(r"`[^`]*`|\]\([^)]*\)", lambda match: match[0].replace(" ", "_"), line).split()
    return len(line) > WIDTH and len(words) > 1


@cache
def anchors(page: Path) -> frozenset[str]:
    """Targets of links into a page: its headings, as GitHub names them."""
    found: dict[str, int] = {}
    names = set()
    for _, line in prose(page.read_text(encoding="utf-8")):
        if match := re.match(r"#+ (.*)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "")
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            names.add(f"{name}-{found[name]}" if name in found else name)
            found[name] = found.get(name, 0) + 1
    return frozenset(names)


def test_pages_are_found():
    assert {"README.md", "docs/ase.md", "docs/developer/tour.md", "moecalc/models/metals10.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [f"{n}: {len(line)} columns" for n, line in prose(text) if too_long(line)] == []


@pytest.mark.parametrize("page", PAGES)
def test_neighbor_has_one_spelling(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"(?<!matscipy\.)\b\w*[Nn]eighbour\w*", text) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    path = ROOT / page
    broken = []
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, heading = target.partition("#")
        leads_to = path.parent / name if name else path
        if not leads_to.exists() or (heading and heading not in anchors(leads_to)):
            broken.append(target)
    assert broken == []


def test_every_page_of_the_docs_is_in_an_index():
    indices = [ROOT / "docs" / "index.md", ROOT / "docs" / "developer" / "index.md"]
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for index in indices
        for target in LINK.findall(index.read_text(encoding="utf-8"))
        if "://" not in target
    }
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")} - {indices[0].resolve()}
    assert pages <= linked


def stops() -> list[tuple[str, str]]:
    """File and name of every stop of the tour."""
    text = (ROOT / TOUR).read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| .+ \|$", text, flags=re.MULTILINE)


def test_the_tour_has_every_stop_in_one_line():
    text = (ROOT / TOUR).read_text(encoding="utf-8")
    assert len(stops()) == len(re.findall(r"^\| `", text, flags=re.MULTILINE)) > 40


@pytest.mark.parametrize(("file", "name"), stops())
def test_stops_of_the_tour_exist(file, name):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"\b{re.escape(name.rpartition('::')[2])}\b", source)


def test_files_that_developers_are_told_of_exist():
    named = {
        (page.name, name)
        for page in (ROOT / "docs" / "developer").glob("*.md")
        for name in re.findall(
            r"`((?:moecalc|cpp|lammps_plugin|tests|benchmarks)/[\w/.]+)`", page.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 40
    assert sorted(f"{page}: {name}" for page, name in named if not (ROOT / name).exists()) == []


def test_settings_of_the_fit_are_all_described():
    options = pytest.importorskip("moecalc.training.options")
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.partition("### Settings of the fit")[2].partition("###")[0]
    rows = [line.split("|") for line in table.split("\n") if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[1])} == set(
        options.Options.model_fields
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a " * 60, True),
        ("a" * 120, False),
        ("`" + "a " * 60 + "`", False),
        ("- `" + "a " * 60 + "`", True),
        ("short", False),
    ],
)
def test_what_counts_as_long(line, expected):
    assert too_long(line.strip()) is expected
