"""What a page of results must be: well formed, in one file, with words for its pictures."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page that was read: `problems` has what is wrong with its form."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.problems = text, [], []
        self.ids, self.anchors, self.pictures, self.resources, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.open]
        self.problems += [f"id {name} twice" for name in set(self.ids) if self.ids.count(name) > 1]
        self.problems += [f"no target for #{name}" for name in self.anchors if name not in self.ids]
        self.problems += [f"no words for picture {k}" for k, (_, alt) in enumerate(self.pictures) if not alt]

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        for name in ("src", "href"):
            if values.get(name, "").startswith("#"):
                self.anchors.append(values[name][1:])
            elif name in values:
                self.resources.append(values[name])
        if tag == "img":
            self.pictures.append((values["src"], values.get("alt", "")))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.words.append(data)

    @property
    def shown(self):
        """The text, with single spaces."""
        return " ".join(" ".join(self.words).split())


def read_page(path):
    """A page in one well-formed file, whose pictures can be drawn."""
    page = Page(path.read_text(encoding="utf-8"))
    assert page.problems == []
    assert page.text.startswith("<!doctype html>")
    assert [link[:60] for link in page.resources if not link.startswith("data:")] == []
    assert re.findall(r"url\(|@import|<script|<iframe", page.text) == []
    for source, _ in page.pictures:
        kind, _, content = source.removeprefix("data:").partition(";base64,")
        picture = base64.b64decode(content, validate=True)
        if kind == "image/png":
            assert picture.startswith(b"\x89PNG")
        else:
            assert kind == "image/svg+xml"
            ET.fromstring(picture)
            links = re.findall(rb'href="([^"]*)"', picture)
            assert [link for link in links if not link.startswith((b"#", b"data:"))] == []
    assert path.stat().st_size < 3_000_000
    return page
