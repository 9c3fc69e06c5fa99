"""One page of several files: artifacts and outcomes, how they descend from each other, and what they say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qmamba_cli.html import bench, compare, drift, sensitivity
from qmamba_cli.html.artifacts import calibration_blocks, quantized_blocks
from qmamba_cli.html.lineage import HEADINGS, SHOWN, Column, Edge, Node, lineage_chart
from qmamba_cli.html.page import Block, Figure, Items, Section, Table, Text, merged, render_page
from qmamba_cli.html.page import Column as Heading
from qmamba_cli.html.results import Run, results_blocks


class Kind(StrEnum):
    """What a file holds, in words."""

    CALIBRATION = "calibration"
    QUANTIZED = "quantized model"
    RUN = "results"
    COMPARISON = "comparison"
    SENSITIVITY = "sensitivity"
    DRIFT = "drift"
    BENCH = "times"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a report.

    Attributes:
        name: what a reader calls it.
        kind: what it holds.
        digest: of an artifact its content digest, of an outcome the sha256 of the file.
        record: its JSON; of an artifact what `qmamba inspect --json` prints.
    """

    name: str
    kind: Kind
    digest: str
    record: Mapping[str, Any]

    @property
    def what(self) -> str:
        """The kind in words, marked where an interrupted command left it."""
        return f"{self.kind.value}, partial" if self.record.get("partial") else self.kind.value


# Kind → keys that only its files have together.
_MARKS: Mapping[Kind, tuple[str, ...]] = {
    Kind.RUN: ("results", "configs", "qmamba"),
    Kind.COMPARISON: ("modes", "pairs", "qmamba"),
    Kind.SENSITIVITY: ("sites", "everything", "qmamba"),
    Kind.DRIFT: ("curves", "n", "qmamba"),
    Kind.BENCH: ("rows", "machine", "settings"),
}
_Sections = Callable[[Mapping[str, Any]], list[Section]]
_VIEWS: Mapping[Kind, tuple[_Sections, Callable[[Mapping[str, Any]], str]]] = {
    Kind.COMPARISON: (compare.compare_sections, compare.headline),
    Kind.SENSITIVITY: (sensitivity.sensitivity_sections, sensitivity.headline),
    Kind.DRIFT: (drift.drift_sections, drift.headline),
    Kind.BENCH: (bench.bench_sections, bench.headline),
}
_TITLES = {
    Kind.COMPARISON: "Comparison",
    Kind.SENSITIVITY: "Sensitivity",
    Kind.DRIFT: "Drift",
    Kind.BENCH: "Times",
}


def kind_of_record(record: Any) -> Kind | None:
    """What a JSON file holds, by its content; None for nothing of this program's."""
    if not isinstance(record, dict):
        return None
    return next((kind for kind, marks in _MARKS.items() if all(mark in record for mark in marks)), None)


def report_page(sources: Sequence[Source]) -> str:
    """The whole page.

    Args:
        sources: at least one; their order is kept among files of one kind.
    """
    models = sorted({str(model[0]) for source in sources if (model := _model(source)) is not None})
    facts = {
        "files": str(len(sources)),
        "weights": ", ".join(sorted({text for source in sources if (text := _weights(source))})) or "n/a",
        "version": ", ".join(sorted({text for source in sources if (text := _version(source))})) or "n/a",
    }
    return render_page(
        f"Report on {', '.join(models)}" if models else "Report",
        [_summary(sources), _lineage(sources), *_details(sources)],
        facts=facts,
        footer="Every number is of a file named above; n and interval stand beside it. KL divergence: float "
        "model ‖ quantized model, nats a token.",
    )


def source_sections(source: Source) -> list[Section]:
    """What one file adds to a page.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError: it lacks what its kind must have.
    """
    # What the other parts of the page read, so that one call says whether a file is sound.
    for read in (_links, _model, _weights, _version):
        read(source)
    heading = f"{_TITLES.get(source.kind, source.kind.capitalize())}: {source.name}"
    match source.kind:
        case Kind.CALIBRATION:
            return [Section(heading=heading, blocks=calibration_blocks(source.record))]
        case Kind.QUANTIZED:
            return [Section(heading=heading, blocks=quantized_blocks(source.record))]
        case Kind.RUN:
            blocks = results_blocks([Run(name=source.name, record=source.record)])
            return [Section(heading=heading, blocks=blocks)]
    sections, headline = _VIEWS[source.kind]
    lead = [text for text in (_scope(source), headline(source.record)) if text]
    return [merged(heading, sections(source.record), lead=" ".join(lead))]


def _details(sources: Sequence[Source]) -> list[Section]:
    sections: list[Section] = []
    runs = [Run(name=one.name, record=one.record) for one in sources if one.kind is Kind.RUN]
    for kind in Kind:
        if kind is Kind.RUN and runs:
            note = "Runs that read the same documents are told apart by qmamba compare, which pairs them."
            sections.append(Section(heading="Results", blocks=[*results_blocks(runs), Text(text=note)]))
            continue
        for source in sources:
            if source.kind is kind:
                sections += source_sections(source)
    return sections


def _summary(sources: Sequence[Source]) -> Section:
    lines = []
    for kind, (_sections, headline) in _VIEWS.items():
        chosen = [source for source in sources if source.kind is kind]
        lines += [f"{source.name}: {text}" for source in chosen if (text := headline(source.record))]
    blocks: list[Block] = [Items(lines=lines)] if lines else []
    files = Table(
        columns=(Heading(heading="file"), Heading(heading="what it is"), Heading(heading="digest")),
        rows=[(one.name, one.what, one.digest[:SHOWN]) for one in sources],
        caption="digest: an artifact's content digest, else the sha256 of the file; the first 12 digits",
    )
    return Section(heading="Summary", blocks=[*blocks, files])


def _scope(source: Source) -> str:
    """How much an outcome rests on, where its own sections leave it to the page's facts."""
    record = source.record
    match source.kind:
        case Kind.SENSITIVITY:
            n, context = record["n"], record["qmamba"]
            return f"{context['weights']}, {n['tokens']:,} scored tokens in {n['documents']:,} documents."
        case Kind.DRIFT:
            n, context = record["n"], record["qmamba"]
            return f"{context['weights']}, {n['streams']} streams of {n['length']:,} tokens."
        case Kind.COMPARISON:
            return f"{record['qmamba']['weights']}, {record['qmamba']['task']['task']}."
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Links:
    """Digests that a file names, or empty strings."""

    quantized: str
    calibration: str
    model: str


def _links(source: Source) -> _Links:
    def named(record: Mapping[str, Any], link: str) -> str:
        found = record.get(link) or {}
        return str(found.get("digest") or found.get("content_digest") or "")

    match source.kind:
        case Kind.CALIBRATION:
            return _Links(quantized="", calibration="", model=named(source.record["manifest"], "model"))
        case Kind.QUANTIZED:
            manifest = source.record["manifest"]
            return _Links(
                quantized="", calibration=named(manifest, "calibration"), model=named(manifest, "model")
            )
    # Times of random weights have no lineage.
    own = source.record.get("qmamba") or {}
    return _Links(
        quantized=named(own, "artifact"), calibration=named(own, "calibration"), model=named(own, "model")
    )


class _Family:
    """Nodes and edges of the lineage, and where two files contradict each other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.nodes: dict[str, Node] = {}
        self.edges: list[Edge] = []
        self.problems: list[str] = []
        self._parents: dict[str, tuple[str, str]] = {}
        artifacts = [one for one in sources if one.kind in (Kind.CALIBRATION, Kind.QUANTIZED)]
        for source in artifacts:
            column = Column.CALIBRATION if source.kind is Kind.CALIBRATION else Column.QUANTIZED
            self._add(source.digest, column, source.name, given=True)
        # What an artifact says of itself is heard before what an outcome says of it.
        for source in sorted(sources, key=lambda one: one.kind not in (Kind.CALIBRATION, Kind.QUANTIZED)):
            self._relate(source)

    def _relate(self, source: Source) -> None:
        links, model = _links(source), _model(source)
        artifact = source.kind in (Kind.CALIBRATION, Kind.QUANTIZED)
        if links.model:
            name = model[0] if model is not None else "float model"
            self._add(links.model, Column.MODEL, name, given=artifact)
        if links.calibration:
            self._add(links.calibration, Column.CALIBRATION, "calibration", given=False)
            self._join(links.model, links.calibration, source.name)
        if links.quantized:
            self._add(links.quantized, Column.QUANTIZED, _weights(source), given=False)
            self._join(links.calibration or links.model, links.quantized, source.name)
        parent = links.quantized or links.calibration or links.model
        if artifact:
            self._join(parent, source.digest, source.name)
            return
        # Outcomes are told apart by their names: two commands may print the same bytes.
        self._add(f"outcome {source.name}", Column.OUTCOME, source.name, given=True, digest=source.digest)
        self.edges.append(Edge(parent=parent, child=f"outcome {source.name}"))

    def _add(self, key: str, column: Column, name: str, *, given: bool, digest: str | None = None) -> None:
        if key not in self.nodes:
            digest = key if digest is None else digest
            self.nodes[key] = Node(key=key, column=column, name=name, digest=digest, given=given)

    def _join(self, parent: str, child: str, witness: str) -> None:
        """Note that ``witness`` says ``child`` was made from ``parent``; others may have said otherwise."""
        if not parent:
            return
        known = self._parents.get(child)
        if known is None:
            self._parents[child] = (parent, witness)
            self.edges.append(Edge(parent=parent, child=child))
        elif known[0] != parent:
            self.edges.append(Edge(parent=parent, child=child, wrong=True))
            self.problems.append(
                f"{witness} says that {child[:SHOWN]} comes from {parent[:SHOWN]}, but {known[1]} says "
                f"{known[0][:SHOWN]}: one of the two was replaced after the other was made."
            )


def _lineage(sources: Sequence[Source]) -> Section:
    family = _Family(sources)
    chart = lineage_chart(list(family.nodes.values()), family.edges)
    caption = (
        "By digest, first 12 digits. Dashed boxes are named by a file but are not on this page themselves."
    )
    blocks: list[Block] = [Figure(svg=chart, caption=caption)]
    made = [node for node in family.nodes.values() if node.column in (Column.CALIBRATION, Column.QUANTIZED)]
    absent = [f"{HEADINGS[node.column]} {node.digest[:SHOWN]}" for node in made if not node.given]
    if family.problems:
        blocks.append(Items(lines=family.problems))
    elif absent:
        blocks.append(
            Text(text=f"No two files contradict each other. Not on this page: {', '.join(absent)}.")
        )
    elif made:
        blocks.append(Text(text="Every digest that a file names belongs to a file on this page."))
    return Section(heading="Lineage", blocks=blocks)


def _model(source: Source) -> tuple[str, str] | None:
    """Name and digest of the float model that a file names."""
    own = source.record.get("manifest") or source.record.get("qmamba") or {}
    model = own.get("model")
    return (str(model["source"]), str(model["digest"])) if model else None


def _weights(source: Source) -> str:
    if source.kind is Kind.QUANTIZED:
        return f"W{source.record['manifest']['quantization']['w_bits']}A8"
    return str((source.record.get("qmamba") or {}).get("weights") or "")


def _version(source: Source) -> str:
    own = source.record.get("manifest") or source.record.get("qmamba") or {}
    return str(own.get("tool_version") or source.record.get("machine", {}).get("qmamba-cli") or "")
