"""The outcome of `drift`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column

if TYPE_CHECKING:
    from qmamba_cli.evaluation.drift import Point
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
    lengths = max(([point.t for point in one.points] for one in report.curves), key=len)[-_LENGTHS:]
    marked = ", partial" if report.partial else ""
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
            *_kls(one.points, lengths),
            f"{one.points[-1].logits_error * 100:.2f} %",
            f"{one.points[-1].state_error * 100:.2f} %",
        )
        for one in report.curves
    ]
    streams = f"{n['streams']} stream{'' if n['streams'] == 1 else 's'} of {n['length']:,} tokens{marked}"
    console.table(
        f"{context['weights']}, {streams}, {context['seconds']:.1f} s",
        columns,
        cells,
        caption="KL to the float model, nats a token, mean since the length before; errors at the last",
    )
    for path in written:
        console.note(f"written to {path}")


def _kls(points: "Sequence[Point]", lengths: Sequence[int]) -> list[str]:
    """KL at each length; empty where an interrupted curve has not come so far."""
    found = {point.t: f"{point.kl:.4g}" for point in points}
    return [found.get(length, "") for length in lengths]
