"""A report's HTML read back with the standard library's parser: every element closed, tables as texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}


@dataclass
class SectionPart:
    headings: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)


class HTMLPage(HTMLParser):
    """`sections` by anchor; `tables` by caption, the first of each, its rows as texts; `addresses` are all links."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.sections: dict[str, SectionPart] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.markdown: list[str] = []
        self.text = ""
        self._open: list[tuple[str, dict[str, str]]] = []
        self._texts: list[str] = []
        self._labels: list[tuple[str, str]] = []

    @classmethod
    def parse(cls, html: str) -> HTMLPage:
        page = cls()
        page.feed(html)
        page.close()
        assert not page._open, f"not closed: {page._open}"
        page.addresses += re.findall(r"(?:url\(|@import\s+)['\"]?([^'\")\s]+)", html)
        return page

    def labels_of(self, tag: str) -> list[str]:
        return [label for name, label in self._labels if name == tag]

    @property
    def drawing_ids(self) -> set[str]:
        """Shapes that a drawing defines for itself."""
        return {address.removeprefix("#") for address in self.addresses}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = self._note(tag, attrs)
        if tag == "section":
            self.sections[attributes["id"]] = SectionPart()
        if tag not in VOID:
            self._open.append((tag, attributes))
            self._texts.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        self._texts = [text + data for text in self._texts]

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        self._keep(tag, " ".join(self._texts[-1].split()), self._texts.pop())

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> dict[str, str]:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [attributes[name] for name in ("href", "xlink:href", "src", "action") if name in attributes]
        self._labels += [(tag, attributes["aria-label"])] if "aria-label" in attributes else []
        return attributes

    def _keep(self, tag: str, text: str, raw: str) -> None:
        if tag == "pre":
            self.markdown.append(raw)
        if not self.sections:
            return
        section = list(self.sections.values())[-1]
        if tag == "h3":
            section.headings.append(text)
        elif tag == "figcaption":
            section.figures.append(text)
        elif tag == "caption":
            section.captions.append(text)
            self._table: list[list[str]] = []
            name = text if text not in self.tables else f"{text} ({len(self.tables)})"
            self.tables[name] = self._table
        elif tag in ("th", "td"):
            self._cells = [*getattr(self, "_cells", []), text]
        elif tag == "tr":
            self._table.append(self._cells)
            self._cells = []
