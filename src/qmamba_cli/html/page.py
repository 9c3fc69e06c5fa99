"""A page: one file without scripts, fonts or addresses to load, for light, dark, phone and paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table: its heading, and whether its cells are numbers."""

    heading: str
    number: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under headings; it scrolls inside its box where it is too wide.

    Attributes:
        columns: headings.
        rows: cells as text, one for each column.
        caption: what the numbers are, or empty.
        marked: rows to set off, by index.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: frozenset[int] = frozenset()
    kind: str = field(default="table", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing of this package's, with a caption."""

    svg: str
    caption: str = ""
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list of sentences."""

    lines: Sequence[str]
    kind: str = field(default="items", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subheading:
    """A heading inside a section."""

    text: str
    kind: str = field(default="subheading", init=False)


Block: TypeAlias = Table | Figure | Text | Items | Subheading


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Blocks under a heading."""

    heading: str
    blocks: Sequence[Block]


def merged(heading: str, sections: Sequence[Section], *, lead: str = "") -> Section:
    """One section of several, whose headings become headings inside it.

    Args:
        heading: of the one section.
        sections: in their order.
        lead: a paragraph before them, or empty.
    """
    blocks: list[Block] = [Text(text=lead)] if lead else []
    for section in sections:
        blocks += [Subheading(text=section.heading), *section.blocks]
    return Section(heading=heading, blocks=blocks)


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    facts: Mapping[str, str] | None = None,
    footer: str = "",
) -> str:
    """The whole page as text.

    Args:
        title: heading of the page and of its window.
        sections: in their order; with three or more there is a list of them at the top.
        lead: the finding in one or two sentences.
        facts: names and values of how it was made.
        footer: last line, or empty.

    Returns:
        An HTML document that needs nothing outside itself. All text is escaped.
    """
    return _template().render(
        title=title,
        sections=[
            {"heading": section.heading, "blocks": section.blocks, "id": f"section-{index}"}
            for index, section in enumerate(sections, 1)
        ],
        lead=lead,
        facts=dict(facts or {}),
        footer=footer,
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qmamba_cli.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
