"""What every page and drawing must be: well formed, self-contained, named, and drawn with finite numbers."""

import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "hr", "img", "input", "col"}
_NUMERIC = {
    "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "width", "height", "points", "viewBox",
    "fill-opacity", "transform",
}  # fmt: skip
# Whatever makes a browser load something.
_LOADING = re.compile(r"https?:|//[a-z]|url\(|@import|\bsrc=|<link|<script|<iframe|<object", re.IGNORECASE)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def find(self, tag: str, kind: str = "") -> list["Element"]:
        """Every element of that tag below, and of that class where one is named."""
        found = [] if self.tag != tag or kind not in self.attributes.get("class", "") else [self]
        return found + [hit for child in self.children for hit in child.find(tag, kind)]

    def all_text(self) -> str:
        return self.text + "".join(child.all_text() for child in self.children)


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].text += data


def parsed(text: str) -> Element:
    """The tree of a document or a drawing, every tag closed."""
    tree = _Tree()
    tree.feed(text)
    tree.close()
    assert tree.open == [tree.root], f"<{tree.open[-1].tag}> is never closed"
    return tree.root


def checked_drawings(text: str) -> list[Element]:
    """Every <svg> of a text, each with a role, a label, a title and finite numbers."""
    drawings = parsed(text).find("svg")
    for drawing in drawings:
        assert drawing.attributes["role"] == "img"
        titles = [child.text for child in drawing.children if child.tag == "title"]
        assert titles == [drawing.attributes["aria-label"]]
        assert titles[0]
        _check_numbers(drawing)
    return drawings


def _check_numbers(element: Element) -> None:
    # The parser lowers the names of attributes.
    for name, value in element.attributes.items():
        if name in {one.lower() for one in _NUMERIC}:
            numbers = re.findall(r"[^\s,()]+", value.removeprefix("rotate"))
            assert numbers, f"{element.tag} {name} is empty"
            assert all(math.isfinite(float(number)) for number in numbers), f"{element.tag} {name}={value}"
    for child in element.children:
        _check_numbers(child)


def checked_page(text: str) -> Element:
    """A page that needs nothing outside itself and fits a phone."""
    assert text.startswith("<!DOCTYPE html>")
    assert not _LOADING.search(text), _LOADING.search(text)
    root = parsed(text)
    (html,) = root.find("html")
    assert html.attributes["lang"] == "en"
    assert len(root.find("h1")) == 1
    assert root.find("title")[0].text == root.find("h1")[0].text
    viewport = [meta for meta in root.find("meta") if meta.attributes.get("name") == "viewport"]
    assert "width=device-width" in viewport[0].attributes["content"]
    style = root.find("style")[0].text
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    # Whatever is wide scrolls inside a box of its own.
    boxed = sum(len(box.find("table") + box.find("svg", "chart")) for box in root.find("div", "box"))
    assert boxed == len(root.find("table")) + len(root.find("svg", "chart"))
    targets = {section.attributes["id"] for section in root.find("section")}
    assert {link.attributes["href"].removeprefix("#") for link in root.find("a")} <= targets
    checked_drawings(text)
    return root
