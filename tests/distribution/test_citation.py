"""What is to be cited is the same in packages, the default model, its card and CITATION.cff."""

import tomllib
from pathlib import Path

import pytest

import moecalc
from moecalc.models import default_model_path
from moecalc.package.archive import check_archive, read_metadata
from moecalc.package.build import CITATION

ROOT = Path(__file__).resolve().parents[2]
PAPERS = {
    "arXiv:2603.07977": (
        "Yuzhi Liu",
        "Mixture of experts architectures for machine learning interatomic potentials",
    ),
    "arXiv:2506.01686": ("Duo Zhang", "A Graph Neural Network for the Era of Large Atomistic Models"),
}


@pytest.fixture(scope="module")
def record():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", PAPERS)
def test_packages_name_the_first_author(number):
    (part,) = [p for p in CITATION.split("; ") if number in p]
    assert part.startswith(f"{PAPERS[number][0]} et al., ")


def test_default_model_carries_the_citation_of_new_packages():
    check_archive(default_model_path())
    assert read_metadata(default_model_path()).citation == CITATION


@pytest.mark.parametrize("number", PAPERS)
def test_card_names_author_title_and_number(number):
    card = (ROOT / "moecalc/models/metals10.md").read_text(encoding="utf-8")
    author, title = PAPERS[number]
    (entry,) = [e for e in card.split("\n- ") if number in e]
    assert entry.startswith(author)
    assert title in entry


def test_citation_file_has_what_readers_of_the_format_need(record):
    assert {"cff-version", "message", "title", "type", "version", "license", "authors"} <= set(record)
    assert record["cff-version"] == "1.2.0"
    assert record["authors"] == [{"name": "the moecalc developers"}]


def test_citation_file_is_of_this_version_and_license(record):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert record["version"] == moecalc.__version__
    assert record["license"] == project["license"]


def test_citation_file_refers_to_both_papers(record):
    found = {}
    for paper in record["references"]:
        assert {"type", "title", "authors", "year", "url"} <= set(paper)
        assert all(set(a) == {"given-names", "family-names"} for a in paper["authors"])
        first = paper["authors"][0]
        (number,) = [i["value"] for i in paper["identifiers"]]
        found[number] = (f"{first['given-names']} {first['family-names']}", paper["title"])
        assert paper["url"].endswith(number.removeprefix("arXiv:"))
    assert found == PAPERS
