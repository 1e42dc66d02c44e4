"""Results in a page of the documentation, between two marks."""

from __future__ import annotations

from pathlib import Path


def replace_section(page: Path, begin: str, end: str, content: str) -> None:
    """Replace what stands between two lines of a page.

    Args:
        page: a file.
        begin, end: the lines, which stay.
        content: without blank lines around it, which are added.

    Raises:
        ValueError: the page does not have each line once.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: expected the lines {begin!r} and {end!r} once each")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}", encoding="utf-8")
