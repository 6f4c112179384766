"""Reads a page as a browser would."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "img", "source", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, run nothing and load nothing; keeps what a reader would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.items: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []
        assert not {"script", "link", "iframe"} & set(self.tags)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "li":
            self.items.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name in ("src", "srcset", "href"):
                assert str(value).startswith(("data:image/", "#"))
                self.sources.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "li" in self.open:
            self.items[-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def finding(self, head: str) -> str:
        """Return the rest of the finding that begins so; empty where there is none."""
        return next((i[len(head) :].strip() for i in self.items if i.startswith(head)), "")
