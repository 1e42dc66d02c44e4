"""Hooks of MkDocs: bring what stands outside of docs/ into the site, and lead links there.

The pages are written for a reader of the repository, whose links go to any of its files. Markdown pages
outside of docs/ become pages of the site, other files are copied, and links to folders go to their README.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# pages of the repository, and where they are in the site
PAGES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/peers/README.md": "peers.md",
    "examples/README.md": "examples.md",
    "moecalc/models/metals10.md": "metals10.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#\s])")
MARK = re.compile(r"^<!-- not run: .* -->\n", re.MULTILINE)  # for tests/distribution/test_blocks.py


def in_repository(site: str) -> PurePosixPath:
    """Where a page of the site is written."""
    for source, page in PAGES.items():
        if page == site:
            return PurePosixPath(source)
    return PurePosixPath("docs") / site


def in_site(source: str) -> str | None:
    """Where a page or file of the repository is in the site; None: not there."""
    path = ROOT / source
    if path.is_dir():
        return in_site(f"{source}/README.md")
    if not path.is_file():
        return None
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    # as a file, not as a page
    return f"{source}.txt" if path.suffix in {".md", ".py"} else source


def targets(text: str, site: str) -> dict[str, tuple[str, str] | None]:
    """Relative links of a page, with where they lead in the repository and in the site."""
    folder = in_repository(site).parent
    found: dict[str, tuple[str, str] | None] = {}
    for target in LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:"):
            source = os.path.normpath(folder / target)
            place = in_site(source)
            found[target] = None if place is None else (source, place)
    return found


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository, and the files that any page links to."""
    for source, site in PAGES.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / source)))
    for file in list(files.documentation_pages()):
        for found in targets(file.content_string, file.src_uri).values():
            if found and files.get_file_from_path(found[1]) is None:
                files.append(File.generated(config, found[1], abs_src_path=str(ROOT / found[0])))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Lead links to where the site has their targets; a link to what it does not have becomes text."""
    site = page.file.src_uri
    for target, found in targets(markdown, site).items():
        if found is None:
            markdown = re.sub(rf"\[([^\]]*)\]\({re.escape(target)}(#[^)]*)?\)", r"\1", markdown)
        else:
            new = os.path.relpath(found[1], Path(site).parent)
            markdown = re.sub(rf"\]\({re.escape(target)}(?=[)#\s])", f"]({new}", markdown)
    return MARK.sub("", markdown)
