"""Reads a page as a browser would, and compares what it says with what it said before."""

import re
from html.parser import HTMLParser
from pathlib import Path

RECORDED = Path(__file__).parent / "recorded"
VOID = {"meta", "br", "img", "source", "link", "hr", "input"}
CLOCK = re.compile(r"\d{4}-\d\d-\d\d( \d\d:\d\d UTC)?|^\d+\.\d s$")
READ = {"li", "p", "strong", "small"}


class Page(HTMLParser):
    """Checks that tags nest and load nothing; keeps what a reader would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.items: list[str] = []
        self.figures: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe")
        if tag not in VOID:
            self.open.append(tag)
        if tag in READ:
            self.items.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.key = dict(attrs).get("id") or ""
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name in ("src", "srcset", "href"):
                assert str(value).startswith(("data:image/", "#"))
                self.sources.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.figures[self.key] = data
            return
        if "style" not in self.open:
            self.text += data
        if READ & set(self.open):
            self.items[-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def says_as_recorded(self, name: str) -> None:
        """Compare cards and sentences with a file; where it was deleted, it is recorded again."""
        said = [CLOCK.sub("…", " ".join(item.split())) for item in self.items]
        file = RECORDED / f"{name}.txt"
        if not file.exists():
            file.write_text("\n".join(said) + "\n", encoding="utf-8")
            raise AssertionError(f"{file.name} is recorded again: read it, and commit it.")
        assert said == file.read_text(encoding="utf-8").splitlines()
