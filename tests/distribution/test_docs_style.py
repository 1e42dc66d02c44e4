"""Documentation is plain to read: short lines, one spelling, links that lead somewhere, names that exist."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 100
LEFT_OUT = {"build", "dist", "site", "venv"}  # made, not written
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in LEFT_OUT for part in path.relative_to(ROOT).parts)
)
TOUR = "docs/developer/tour.md"
# results of benchmarks/peers/compare.py and benchmarks/snap.py, as they write them
GENERATED = re.compile(r"<!-- results of [^\n]*: begin -->.*?<!-- results of [^\n]*: end -->", re.DOTALL)
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
    indices = [ROOT / "docs" / folder / "index.md" for folder in (".", "developer", "api")]
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


def script(name):
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_options_of_the_fit_are_those_of_the_code():
    pytest.importorskip("torch")
    text = (ROOT / "docs" / "fit_options.md").read_text(encoding="utf-8")
    assert script("fit_tables").renewed(text) == text, "run: python docs/fit_tables.py"


def test_every_option_of_the_fit_has_a_meaning():
    pytest.importorskip("torch")
    sections = script("fit_tables").SECTIONS
    fields = [
        (f"{section}.{name}", field)
        for section, options in sections
        for name, field in options.model_fields.items()
    ]
    assert len(fields) > 60
    assert [name for name, field in fields if not field.description] == []


def test_picture_of_the_speed_shows_the_measured_table(tmp_path):
    picture = script("speed_picture")
    page = picture.PAGE.read_text(encoding="utf-8")
    same, simple = picture.measured(page), picture.beside_snap(page)
    shown = picture.PICTURE.read_text(encoding="utf-8")
    assert picture.numbers([*same, *simple]) in shown, "run: python docs/speed_picture.py"
    picture.draw(same, simple, tmp_path / "speed.svg")
    assert picture.numbers([*same, *simple]) in (tmp_path / "speed.svg").read_text(encoding="utf-8")


def test_picture_of_the_speed_needs_every_form():
    picture = script("speed_picture")
    with pytest.raises(KeyError, match="moecalc, LAMMPS"):
        picture.measured("| dynamic | moecalc, ASE | 0.2 (0.1-0.3) | 807 | 0.3 | 286 | 0 | 0 |")
    with pytest.raises(KeyError, match="qSNAP"):
        picture.beside_snap("| moecalc, default model | 1 | 1 | 1 |\n| SNAP | 1 | 1 | 1 |")


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", text.partition("\nnav:")[2]))
    docs = ROOT / "docs"
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} <= listed


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
