"""The outcome of `export`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.views.calibration import DIGEST_SHOWN

if TYPE_CHECKING:
    from qmamba_cli.stages.export import ExportReport
    from qmamba_cli.stages.parts import Part


def show_export(report: "ExportReport", *, dry_run: bool, as_json: bool) -> None:
    """The outcome of `export`."""
    if as_json:
        values = asdict(report) | {"path": str(report.path), "dry_run": dry_run}
        values["parts"] = [
            {"part": part.name, "bytes": part.bytes, "bits_per_weight": part.bits_per_weight}
            for part in report.parts
        ]
        console.write_json(values)
        return
    written = "not written" if dry_run else f"digest {report.digest[:DIGEST_SHOWN]}"
    size = f"{console.size(report.bytes)}, {report.bits_per_weight:.2f} bits per weight"
    show_parts(f"{report.path}: {size}, {written}", report.parts)


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
