"""Reads a report as a strict reader would: it nests, its charts are XML, it fetches nothing."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

VOID = {"meta", "link", "br", "hr", "img", "wbr"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects headings, ids and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.urls += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read_page(path: Path) -> tuple[str, str]:
    """The page's source and its text; it nests, its charts are XML, it fetches nothing."""
    source = path.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(source)
    assert outline.open == []
    assert all(url.startswith("data:") for url in outline.urls)
    head, *scripts = re.split(r"<script>.*?</script>", source, flags=re.DOTALL)
    assert len(scripts) == 1, "one script, the page's own, in the page itself"
    assert not re.search(r"@import|url\(|<script|\$\{?[a-z]", head + scripts[0])
    for chart in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        ElementTree.fromstring(chart)
    return source, " ".join(outline.text)
