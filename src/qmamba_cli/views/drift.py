"""The outcome of `drift`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column

if TYPE_CHECKING:
    from qmamba_cli.stages.drift import DriftReport

# Lengths whose KL a table shows; the files hold them all.
_LENGTHS = 6


def drift_csv(report: "DriftReport") -> str:
    """Every point of every curve as CSV, with a heading."""
    lines = ["mode,path,t,kl,kl_low,kl_high,logits_error,state_error"]
    for one in report.curves:
        for point in one.points:
            low, high = point.kl_ci or ("", "")
            cells = (one.mode, one.path, point.t, point.kl, low, high, point.logits_error, point.state_error)
            lines.append(",".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def show_drift(report: "DriftReport", *, written: Sequence[Path], as_json: bool) -> None:
    """A table on stdout, or one JSON object."""
    record = report.record()
    if as_json:
        from qmamba_cli.evaluation.results import to_json

        console.write(to_json(record))
        return
    context, n = record["qmamba"], record["n"]
    lengths = [point.t for point in report.curves[0].points][-_LENGTHS:]
    columns = (
        Column("mode"),
        Column("path"),
        *(Column(f"KL at {length}", True) for length in lengths),
        Column("logits, error", True),
        Column("state, error", True),
    )
    cells = [
        (
            one.mode,
            one.path,
            *(f"{point.kl:.4g}" for point in one.points[-_LENGTHS:]),
            f"{one.points[-1].logits_error * 100:.2f} %",
            f"{one.points[-1].state_error * 100:.2f} %",
        )
        for one in report.curves
    ]
    console.table(
        f"{context['weights']}, {n['streams']} streams of {n['length']:,} tokens, {context['seconds']:.1f} s",
        columns,
        cells,
        caption="KL to the float model, nats a token, mean since the length before; errors at the last one",
    )
    for path in written:
        console.note(f"written to {path}")
