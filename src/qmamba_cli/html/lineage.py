"""The lineage as a picture: which file was made from which, by digest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from qmamba_cli.html import svg
from qmamba_cli.html.charts import WIDTH

# A box, and the room between boxes, in user units.
_BOX, _TALL, _GAP = 152.0, 50.0, 14.0
_HEAD = 26.0
SHOWN = 12
"""Characters of a digest that a person reads."""


class Column(IntEnum):
    """What a box stands for; its place from left to right."""

    MODEL = 0
    CALIBRATION = 1
    QUANTIZED = 2
    OUTCOME = 3


HEADINGS = {
    Column.MODEL: "float model",
    Column.CALIBRATION: "calibration",
    Column.QUANTIZED: "quantized model",
    Column.OUTCOME: "outcomes",
}
"""Of the columns, from left to right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One box.

    Attributes:
        key: unique name; a digest where there is one.
        column: what it is.
        name: what a reader calls it.
        digest: in full, or empty.
        given: whether the file itself was read; else others only name it.
    """

    key: str
    column: Column
    name: str
    digest: str
    given: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """``child`` was made from ``parent``, by their keys.

    Attributes:
        parent: key.
        child: key.
        wrong: whether another file contradicts it.
    """

    parent: str
    child: str
    wrong: bool = False


def lineage_chart(nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """Boxes in columns, each joined to what it was made from.

    Args:
        nodes: in any order; in its column each keeps near to what it was made from.
        edges: an edge to an unknown key is left out.
    """
    keys = {node.key: node for node in nodes}
    known = [edge for edge in edges if edge.parent in keys and edge.child in keys]
    rows = max(sum(node.column == column for node in nodes) for column in Column)
    lane = _HEAD + rows * (_TALL + _GAP) + _GAP / 2
    far = [edge for edge in known if _passes_a_column(keys, edge)]
    places: dict[str, tuple[float, float]] = {}
    parts = []
    for column, heading in HEADINGS.items():
        chosen = _ordered([node for node in nodes if node.column == column], known, places)
        x = 1 + (WIDTH - _BOX - 2) / (len(Column) - 1) * column
        # Centred, so that a lone box stands beside the middle of what was made from it.
        top = _HEAD + (rows - len(chosen)) * (_TALL + _GAP) / 2
        if chosen:
            parts.append(svg.text(x, 14, heading, kind="tick"))
        places |= {node.key: (x, top + row * (_TALL + _GAP)) for row, node in enumerate(chosen)}
    for edge in known:
        parts.append(_edge(edge, places, lane if edge in far else None))
    parts += [part for node in nodes for part in _box(node, *places[node.key])]
    height = lane + _GAP / 2 if far else lane
    return svg.figure("Lineage of the files on this page", WIDTH, height, parts)


def _passes_a_column(keys: Mapping[str, Node], edge: Edge) -> bool:
    return keys[edge.child].column - keys[edge.parent].column > 1


def _ordered(
    nodes: Sequence[Node], edges: Sequence[Edge], places: Mapping[str, tuple[float, float]]
) -> list[Node]:
    """The nodes of a column from top to bottom as what they were made from, those from far away last."""
    parents = {edge.child: edge.parent for edge in reversed(edges)}
    nearest = max((x for x, _y in places.values()), default=0.0)

    def place(node: Node) -> tuple[bool, float]:
        x, y = places.get(parents.get(node.key, ""), (-1.0, 0.0))
        return x < nearest, y

    return sorted(nodes, key=place)


def _edge(edge: Edge, places: Mapping[str, tuple[float, float]], lane: float | None) -> str:
    """A line from box to box; one that passes a column goes below its boxes, along ``lane``."""
    (x1, y1), (x2, y2) = places[edge.parent], places[edge.child]
    start, end = (x1 + _BOX, y1 + _TALL / 2), (x2, y2 + _TALL / 2)
    # Bends close to the boxes keep slanted lines clear of the boxes above and below.
    points = [start, (start[0] + 8, start[1])]
    if lane is not None:
        points += [(start[0] + 24, lane), (end[0] - 24, lane)]
    points += [(end[0] - 12, end[1]), end]
    return svg.polyline(points, "edge wrong" if edge.wrong else "edge")


def _box(node: Node, x: float, y: float) -> list[str]:
    kind = "box-node" if node.given else "box-node absent"
    tip = f"{node.name}: {node.digest or 'no digest'}{'' if node.given else ' (not on this page)'}"
    room = _BOX - 16
    digest = node.digest[:SHOWN] or "no digest"
    return [
        svg.rect(x, y, _BOX, _TALL, kind, tip=tip, radius=6),
        svg.text(x + 8, y + 21, svg.shortened(node.name, room), kind="name"),
        svg.text(x + 8, y + 39, digest, kind="tick"),
    ]
