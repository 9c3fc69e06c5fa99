"""What differs between two calibrations, two quantized models or two results files."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmamba_cli.artifacts.calibration import read_calibration_manifest
from qmamba_cli.artifacts.manifest import CalibrationManifest, QuantizedManifest, TensorRecord
from qmamba_cli.artifacts.quantized import read_quantized_manifest
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import UsageError
from qmamba_cli.stages.kinds import Kind, kind_of
from qmamba_cli.stages.results_file import ResultsFile, number, read_results

# The least scale there is, in absmax: 127 steps of 1e-8.
_LEAST_ABSMAX = 127e-8
# Lists longer than this are told by their length and how many entries differ.
_LISTED = 8
# Parts of a manifest that are compared in their own way, or follow from the rest.
_NOT_OPTIONS = {"content_digest", "sites", "tensors"}
# Parts of results that are no options: the metrics, and what no two runs share.
_NOT_SETTINGS = {"results", "qmamba.seconds", "qmamba.artifact.path"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionChange:
    """A value that differs; None where a side has none.

    Attributes:
        name: where it is, with dots, as in ``dataset.seed``.
        a: value in the first, as JSON holds it; a long list in words.
        b: value in the second.
    """

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleChange:
    """An activation scale that differs.

    Attributes:
        site: key of the site.
        a: absmax in the first, real units; None where it lacks the site.
        b: absmax in the second.
        ratio: of the scales, b to a; None where one is missing.
    """

    site: str
    a: float | None
    b: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """A tensor that differs.

    Attributes:
        name: in a calibration with its file before it.
        change: ``values``, ``form`` (dtype or shape), ``only in a`` or ``only in b``.
        a: dtype and shape in the first, or an empty string.
        b: dtype and shape in the second.
    """

    name: str
    change: str
    a: str
    b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricChange:
    """A metric that differs.

    Attributes:
        task: the task.
        metric: its name.
        a: value in the first; None where it is missing.
        b: value in the second.
        difference: b - a; None where one is missing or not finite.
        stderr: of the difference of two independent measurements; None where it is not known. Of measurements
            on the same documents the true one is smaller; `qmamba compare` has it.
    """

    task: str
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    stderr: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What `diff` shows.

    Attributes:
        kind: what both are.
        a: path of the first.
        b: path of the second.
        digests: of both; for results, of the files.
        options: values that differ, by name.
        scales: those that differ, the largest change first.
        sites: number of sites of both together.
        tensors: those that differ, by name.
        stored: number of tensors of both together.
        metrics: those that differ.
    """

    kind: Kind
    a: Path
    b: Path
    digests: tuple[str, str]
    options: tuple[OptionChange, ...] = ()
    scales: tuple[ScaleChange, ...] = ()
    sites: int = 0
    tensors: tuple[TensorChange, ...] = ()
    stored: int = 0
    metrics: tuple[MetricChange, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs; of results, nothing but the seconds and the place of the model."""
        if self.kind is Kind.RESULTS:
            return not (self.options or self.metrics)
        return self.digests[0] == self.digests[1]

    @property
    def words(self) -> tuple[str, ...]:
        """The outcome in sentences."""
        return tuple(_words(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        values = asdict(self)
        return {**values, "a": str(self.a), "b": str(self.b), "same": self.same, "words": list(self.words)}


def diff(a: Path, b: Path) -> Difference:
    """Compare two artifacts of one kind, or two results files; no tensor's data is read.

    Args:
        a: a calibration, a quantized model in either form, results, or a work folder for what it has on
            record of the other's kind.
        b: likewise.

    Raises:
        QmambaError: there is nothing at a path.
        UsageError: they are of different kinds.
        ArtifactError: one is damaged.
    """
    kinds = (kind_of(a), kind_of(b))
    if Kind.WORKDIR in kinds:
        a, b = (
            _on_record(path, other) if kind is Kind.WORKDIR else path
            for path, kind, other in ((a, kinds[0], kinds[1]), (b, kinds[1], kinds[0]))
        )
        kinds = (kind_of(a), kind_of(b))
    if kinds[0] is not kinds[1]:
        raise UsageError(
            f"`{a}` and `{b}` do not compare, got {kinds[0]} and {kinds[1]}, expected two of one kind",
            hint="two calibration folders, two exports or two results files",
        )
    match kinds[0]:
        case Kind.RESULTS:
            return _results(read_results(a), read_results(b))
        case Kind.CALIBRATION:
            return _artifacts(kinds[0], a, read_calibration_manifest(a), b, read_calibration_manifest(b))
        case _:
            return _artifacts(kinds[0], a, read_quantized_manifest(a), b, read_quantized_manifest(b))


def _on_record(path: Path, other: Kind) -> Path:
    """What a work folder has to compare with ``other``; beside another work folder, the exports."""
    workdir = Workdir(path)
    return (workdir.resolve_calibration() if other is Kind.CALIBRATION else workdir.resolve_export()).path


def _artifacts(
    kind: Kind,
    a: Path,
    first: CalibrationManifest | QuantizedManifest,
    b: Path,
    second: CalibrationManifest | QuantizedManifest,
) -> Difference:
    sites = first.sites.keys() | second.sites.keys()
    tensors = _records(first), _records(second)
    return Difference(
        kind=kind,
        a=a,
        b=b,
        digests=(first.content_digest, second.content_digest),
        options=_options(first.model_dump(mode="json"), second.model_dump(mode="json"), _NOT_OPTIONS),
        scales=_scales(first, second),
        sites=len(sites),
        tensors=tuple(_tensors(*tensors)),
        stored=len(tensors[0].keys() | tensors[1].keys()),
    )


def _records(manifest: CalibrationManifest | QuantizedManifest) -> dict[str, TensorRecord]:
    if isinstance(manifest, QuantizedManifest):
        return dict(manifest.tensors)
    return {f"{file}: {name}": row for file, rows in manifest.tensors.items() for name, row in rows.items()}


def _options(a: Mapping[str, Any], b: Mapping[str, Any], without: set[str]) -> tuple[OptionChange, ...]:
    first, second = dict(_flat(a, "", without)), dict(_flat(b, "", without))
    return tuple(
        _option(name, first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    )


def _flat(value: Mapping[str, Any], prefix: str, without: set[str]) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        full = f"{prefix}{name}"
        if full in without:
            continue
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{full}.", without)
        else:
            yield full, item


def _option(name: str, a: Any, b: Any) -> OptionChange:
    if isinstance(a, list) and isinstance(b, list) and max(len(a), len(b)) > _LISTED:
        differ = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
        return OptionChange(name=name, a=f"{len(a)} entries", b=f"{len(b)} entries, {differ} differ")
    return OptionChange(name=name, a=a, b=b)


def _scales(
    first: CalibrationManifest | QuantizedManifest, second: CalibrationManifest | QuantizedManifest
) -> tuple[ScaleChange, ...]:
    changes = []
    for site in first.sites.keys() | second.sites.keys():
        a, b = (
            manifest.sites[site].absmax if site in manifest.sites else None for manifest in (first, second)
        )
        if a != b:
            known = a is not None and b is not None
            ratio = max(b or 0.0, _LEAST_ABSMAX) / max(a or 0.0, _LEAST_ABSMAX) if known else None
            changes.append(ScaleChange(site=site, a=a, b=b, ratio=ratio))
    # A missing site is the largest change there is.
    return tuple(sorted(changes, key=lambda row: (-_size(row.ratio), row.site)))


def _size(ratio: float | None) -> float:
    return math.inf if ratio is None else abs(math.log(ratio))


def _tensors(first: Mapping[str, TensorRecord], second: Mapping[str, TensorRecord]) -> Iterator[TensorChange]:
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        if a == b:
            continue
        if a is None or b is None:
            change = "only in b" if a is None else "only in a"
        else:
            change = "values" if (a.dtype, a.shape) == (b.dtype, b.shape) else "form"
        yield TensorChange(name=name, change=change, a=_form(a), b=_form(b))


def _form(record: TensorRecord | None) -> str:
    return "" if record is None else f"{record.dtype} {list(record.shape)}"


def _results(a: ResultsFile, b: ResultsFile) -> Difference:
    return Difference(
        kind=Kind.RESULTS,
        a=a.path,
        b=b.path,
        digests=(a.digest, b.digest),
        options=_options(a.document, b.document, _NOT_SETTINGS),
        metrics=tuple(_metrics(a, b)),
    )


def _metrics(a: ResultsFile, b: ResultsFile) -> Iterator[MetricChange]:
    for task in sorted(a.tasks.keys() | b.tasks.keys()):
        first, second = a.tasks.get(task, {}), b.tasks.get(task, {})
        for key in sorted(first.keys() | second.keys()):
            name, _, filtered = key.partition(",")
            values = number(first.get(key)), number(second.get(key))
            if "_stderr" in name or values == (None, None) or values[0] == values[1]:
                continue
            stderr = f"{name}_stderr,{filtered}"
            yield _metric(task, name, values, (number(first.get(stderr)), number(second.get(stderr))))


def _metric(
    task: str,
    name: str,
    values: tuple[float | None, float | None],
    stderrs: tuple[float | None, float | None],
) -> MetricChange:
    a, b = values
    difference = None if a is None or b is None else b - a
    first, second = stderrs
    return MetricChange(
        task=task,
        metric=name,
        a=a,
        b=b,
        difference=difference if difference is not None and math.isfinite(difference) else None,
        stderr=None if first is None or second is None else math.hypot(first, second),
    )


def _words(found: Difference) -> Iterator[str]:
    if found.same:
        yield f"the two {_plural(found.kind)} are the same" + (
            ", but for the time they took"
            if found.kind is Kind.RESULTS
            else f", digest {found.digests[0][:12]}"
        )
        return
    if found.options:
        named = ", ".join(f"{row.name} {_word(row.a)} -> {_word(row.b)}" for row in found.options[:3])
        yield f"{_count(len(found.options), 'option')}: {named}" + (", …" if len(found.options) > 3 else "")
    elif found.kind is not Kind.RESULTS:
        yield "every option is the same"
    if found.scales:
        first = found.scales[0]
        most = (
            "is missing from one"
            if first.ratio is None
            else f"changed most, by a factor of {first.ratio:.4g}"
        )
        yield f"{len(found.scales)} of {found.sites} scales differ; `{first.site}` {most}"
    elif found.sites:
        yield f"all {found.sites} scales are the same"
    if found.tensors:
        named = ", ".join(f"`{row.name}`" for row in found.tensors[:3])
        more = f" and {len(found.tensors) - 3} more" if len(found.tensors) > 3 else ""
        yield f"{len(found.tensors)} of {found.stored} tensors differ: {named}{more}"
    elif found.stored:
        yield f"all {found.stored} tensors are the same"
    for row in found.metrics:
        yield _metric_words(row)
    if found.kind is Kind.RESULTS and not found.metrics:
        yield "every metric is the same"


def _metric_words(row: MetricChange) -> str:
    text = f"{row.task} {row.metric}: {_word(row.a)} -> {_word(row.b)}"
    if row.difference is None or row.stderr is None or row.stderr == 0.0:
        return text
    return f"{text}, {abs(row.difference) / row.stderr:.1f} standard errors apart if they were independent"


def _word(value: Any) -> str:
    match value:
        case None:
            return "none"
        case float():
            return f"{value:.5g}"
        case list():
            return f"[{', '.join(map(str, value))}]"
        case _:
            # A digest is told by its beginning.
            text = str(value)
            return text[:12] if len(text) == 64 and text.isalnum() else text


def _count(number_of: int, what: str) -> str:
    return f"1 {what} differs" if number_of == 1 else f"{number_of} {what}s differ"


def _plural(kind: Kind) -> str:
    return {Kind.RESULTS: "results files"}.get(kind, f"{kind}s")
