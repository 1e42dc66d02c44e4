"""Results in a page of the documentation, between two marks."""

from __future__ import annotations

from pathlib import Path


def with_section(text: str, begin: str, end: str, content: str) -> str:
    """A text in which `content` stands between two lines, see `replace_section`.

    Raises:
        ValueError: the text does not have each line once.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected the lines {begin!r} and {end!r} once each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def replace_section(page: Path, begin: str, end: str, content: str) -> None:
    """Replace what stands between two lines of a page.

    Args:
        page: a file.
        begin, end: the lines, which stay.
        content: without blank lines around it, which are added.

    Raises:
        ValueError: the page does not have each line once.
    """
    try:
        text = with_section(page.read_text(encoding="utf-8"), begin, end, content)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
    page.write_text(text, encoding="utf-8")
