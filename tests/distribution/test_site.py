"""The site of the documentation builds without a warning, and its links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, and what MkDocs printed."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_pages_of_the_repository_are_in_the_site(site):
    for page in (
        "readme",
        "quickstart",
        "examples",
        "metals10",
        "CONTRIBUTING",
        "developer/tour",
        "api/package",
    ):
        assert (site / page / "index.html").is_file(), page


def test_links_between_pages_lead_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for target in re.findall(r'(?:href|src)="?([^"\s>]+)', page.read_text(encoding="utf-8")):
            name = unquote(target.partition("#")[0])
            if not name or re.match(r"[a-z]+:|//", name):
                continue
            place = page.parent / name
            if not (place.is_file() or (place / "index.html").is_file()):
                broken.append(f"{page.relative_to(site)}: {target}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site):
    text = (site / "quickstart" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|img)[^>]+src="?(https?:[^"\s>]+)', text)
    loaded += re.findall(r'<link[^>]+rel="?stylesheet"?[^>]+href="?(https?:[^"\s>]+)', text)
    assert loaded == []


def test_marks_of_the_tests_are_not_shown(site):
    assert "not run:" not in (site / "install" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("moecalc", ["MoECalculator", "calculate_batch", "skin"]),
        ("package", ["package_checkpoint", "verify_package", "read_metadata"]),
        ("lammps", ["preload_mpi", "build_plugin"]),
        ("zbl", ["guarded", "shortest_distances"]),
        ("errors", ["PackageError"]),
    ],
)
def test_reference_describes_the_public_names(site, module, names):
    text = (site / "api" / module / "index.html").read_text(encoding="utf-8")
    assert [name for name in names if name not in text] == []


@pytest.mark.slow
def test_pages_fit_a_desk_and_a_telephone(site, tmp_path):
    if shutil.which("chromium") is None:
        pytest.skip("no chromium")
    copy = tmp_path / "docs"
    copy.mkdir()
    shutil.copy(ROOT / "docs" / "screenshots.py", copy)
    (tmp_path / "site").symlink_to(site)
    result = subprocess.run(
        [sys.executable, copy / "screenshots.py", tmp_path / "pictures"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 16
