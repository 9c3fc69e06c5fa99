"""The outcome of `export`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.views.calibration import DIGEST_SHOWN, GUESS, duration, shapes

if TYPE_CHECKING:
    from qmamba_cli.stages.export import ExportReport
    from qmamba_cli.stages.parts import Part


def show_export(
    report: "ExportReport", *, dry_run: bool, as_json: bool, sharded: bool = False, pushed: str | None = None
) -> None:
    """The outcome of `export`.

    Args:
        report: the outcome.
        dry_run: whether nothing was written.
        as_json: one JSON object instead of a table.
        sharded: whether a folder was asked for.
        pushed: address that the folder was uploaded to, or None.
    """
    if as_json:
        values = {
            **{name: getattr(report, name) for name in ("digest", "bytes", "bits_per_weight", "files")},
            "path": str(report.path),
            "format": "folder" if sharded else "file",
            "dry_run": dry_run,
            "parts": [
                {"part": part.name, "bytes": part.bytes, "bits_per_weight": part.bits_per_weight}
                for part in report.parts
            ],
        }
        if dry_run:
            values |= {"memory_bytes": report.memory_bytes, "seconds": report.seconds}
            values["tensors"] = dict(report.sizes)
            values["config"] = report.config.to_dict()
        if report.notes:
            values["notes"] = list(report.notes)
        if pushed is not None:
            values["pushed"] = pushed
        console.write_json(values)
        return
    written = "not written" if dry_run else f"digest {report.digest[:DIGEST_SHOWN]}"
    files = f" in {report.files} files" if sharded and not dry_run else ""
    size = f"{console.size(report.bytes)}{files}, {report.bits_per_weight:.2f} bits per weight"
    show_parts(f"{report.path}: {size}, {written}", report.parts)
    if dry_run:
        console.facts(
            "before it starts",
            {
                "model": shapes(report.config),
                "tensors": f"{len(report.sizes)}, {console.size(report.bytes)}",
                "memory": f"about {console.size(report.memory_bytes)} beside the program itself",
                "disk": f"about {console.size(2 * report.bytes)} while it is written",
                "time": f"about {duration(report.seconds)} {GUESS}",
            },
        )
    for note in report.notes:
        console.note(f"note: {note}")
    if pushed is not None:
        console.note(f"uploaded to {pushed}")


def show_parts(title: str, parts: "Sequence[Part]") -> None:
    """Size and bits per weight of each part of a quantized file."""
    total = sum(part.bytes for part in parts)
    columns = (Column("part"), Column("size", True), Column("share", True), Column("bits per weight", True))
    rows = [
        (
            part.name,
            console.size(part.bytes),
            f"{part.bytes / total:.1%}",
            "" if part.bits_per_weight is None else f"{part.bits_per_weight:.2f}",
        )
        for part in parts
    ]
    console.table(title, columns, rows)
