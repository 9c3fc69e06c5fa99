"""The outcome of `sensitivity`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmamba_cli import console
from qmamba_cli.console import Column

if TYPE_CHECKING:
    from qmamba_cli.stages.sensitivity import SensitivityReport

# Rows of a table of single layers, which may have hundreds; the files hold them all.
_LAYER_ROWS = 20
_COLUMNS = (
    Column("tensor"),
    Column("KL to float", True),
    Column("95 % interval", True),
    Column("share", True),
    Column("Δ log-likelihood", True),
    Column("SQNR, dB", True),
    Column("clipped", True),
)
_GAIN = (Column("gain", True), Column("95 % interval", True))


def sensitivity_csv(report: "SensitivityReport") -> str:
    """Every row of every view as CSV, with a heading."""
    from qmamba_cli.evaluation.sensitivity import CSV_COLUMNS, csv_lines

    views = {
        "alone": report.rows.alone,
        "part": report.rows.parts,
        "left-out": report.rows.left_out,
        "per-token": report.rows.per_token,
    }
    lines = [",".join(CSV_COLUMNS)]
    for view, rows in views.items():
        lines += csv_lines(rows, view=view)
    return "\n".join(lines) + "\n"


def show_sensitivity(report: "SensitivityReport", *, written: Sequence[Path], as_json: bool) -> None:
    """Tables on stdout, or one JSON object."""
    record = report.record()
    if as_json:
        from qmamba_cli.evaluation.results import to_json

        console.write(to_json(record))
        return
    context, n = record["qmamba"], record["n"]
    marked = ", partial" if record.get("partial") else ""
    on = (
        f"{context['weights']}, {n['documents']} of {n['original']} documents{marked}, {n['tokens']:,} tokens"
    )
    sites = [row for row in record["sites"] if row["layer"] is None]
    layers = [row for row in record["sites"] if row["layer"] is not None]
    if len(sites) > 1:
        _table(f"one tensor quantized in all layers: {on}", sites)
    if layers:
        shown = f", the first {_LAYER_ROWS} of {len(layers)}" if len(layers) > _LAYER_ROWS else ""
        _table(f"one tensor of one layer quantized{shown}: {on}", layers[:_LAYER_ROWS])
    if record["leave_one_out"]:
        _table("everything quantized but one tensor", record["leave_one_out"], gain=True)
    if record["per_token"]:
        _table("everything quantized, one tensor with one scale a token", record["per_token"], gain=True)
    everything = record["everything"]
    console.facts(
        "everything quantized",
        {
            "KL to float": f"{everything['kl']:.5g} nats a token",
            "95 % interval": _ends(everything["kl_ci"]),
            "log-likelihood": f"{everything['delta_ll']:+.5g} nats a token",
            "seconds": f"{context['seconds']:.1f}",
        },
    )
    for path in written:
        console.note(f"written to {path}")


def _table(title: str, rows: Sequence[Mapping[str, Any]], *, gain: bool = False) -> None:
    cells = [
        (
            _label(row),
            f"{row['kl']:.4g}",
            _ends(row["kl_ci"]),
            *((f"{row['gain']:.3g}", _ends(row["gain_ci"])) if gain else ()),
            f"{(-row['share'] if gain else row['share']) * 100:{'+' if gain else ''}.1f} %",
            f"{row['delta_ll']:+.3g}",
            "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
            "" if row["clip_rate"] is None else f"{row['clip_rate'] * 100:.3g} %",
        )
        for row in rows
    ]
    caption = (
        "gain: KL of everything quantized less this, interval paired; share: change against everything"
        if gain
        else "share: of the sum of such rows; KL and log-likelihood in nats a token"
    )
    columns = (*_COLUMNS[:3], *_GAIN, *_COLUMNS[3:]) if gain else _COLUMNS
    console.table(title, columns, cells, caption=caption)


def _label(row: Mapping[str, Any]) -> str:
    name = f"{row['site']}[{row['part']}]" if "part" in row else row["site"]
    return name if row["layer"] is None else f"layer {row['layer']}, {name}"


def _ends(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
