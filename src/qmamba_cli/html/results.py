"""The sections of `qmamba run`'s results, several files in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmamba_cli.html.charts import Bar, bar_chart
from qmamba_cli.html.page import Block, Column, Figure, Subheading, Table
from qmamba_cli.html.scale import number, real

# Half the width of a 95 % interval of a normal mean, in standard errors.
_NORMAL = 1.96
_FLOAT, _QUANTIZED = 7, 0
_MISSING = "N/A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One results file.

    Attributes:
        name: of the file.
        record: its JSON.
    """

    name: str
    record: Mapping[str, Any]


def results_blocks(runs: Sequence[Run]) -> list[Block]:
    """Every task with a chart of its accuracies and a table of all its runs."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        for task in run.record["results"]:
            tasks.setdefault(task, []).append(run)
    blocks: list[Block] = []
    for task, chosen in tasks.items():
        blocks.append(Subheading(text=task))
        field = "acc" if any("acc,none" in run.record["results"][task] for run in chosen) else "kl"
        bars = [_bar(run, task, field) for run in chosen]
        if any(bar.value is not None for bar in bars):
            title = "accuracy" if field == "acc" else "KL divergence to the float model"
            unit = "share of the last words" if field == "acc" else "nats a token"
            chart = bar_chart(f"{task}: {title} by mode", bars, unit=unit)
            caption = "Whiskers: 95 %, from the standard error." if field == "acc" else ""
            blocks.append(Figure(svg=chart, caption=caption))
        blocks.append(_table(task, chosen))
    return blocks


def _bar(run: Run, task: str, field: str) -> Bar:
    metrics = run.record["results"][task]
    value, error = _metric(metrics, field), _metric(metrics, f"{field}_stderr")
    interval = None
    if value is not None and error is not None:
        interval = (max(value - _NORMAL * error, 0.0), value + _NORMAL * error)
    weights = run.record["qmamba"].get("weights", "")
    tone = _QUANTIZED if str(weights).startswith("W") else _FLOAT
    return Bar(label=_mode(run), value=value, interval=interval, tone=tone, note=_amount(run, task))


def _table(task: str, runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        metrics = run.record["results"][task]
        rows.append(
            (
                _mode(run),
                _amount(run, task).removeprefix("n = "),
                _with_error(metrics, "acc" if "acc,none" in metrics else "top1_acc"),
                _with_error(metrics, "perplexity"),
                number(_metric(metrics, "kl")),
                number(_metric(metrics, "same_top1")),
                number(real(run.record["qmamba"].get("seconds"))),
                run.name,
            )
        )
    headings = ("n", "accuracy", "perplexity", "KL", "same top-1", "seconds")
    return Table(
        columns=(
            Column(heading="mode"),
            *(Column(heading=heading, number=True) for heading in headings),
            Column(heading="file"),
        ),
        rows=rows,
        caption="± is one standard error; KL in nats a token; the seconds are of one run each",
    )


def _mode(run: Run) -> str:
    own = run.record["qmamba"]
    mode = own.get("mode") or {}
    return ", ".join(filter(None, (str(mode.get("name", "?")), str(own.get("weights", "")))))


def _amount(run: Run, task: str) -> str:
    counts = run.record.get("n-samples", {}).get(task)
    marked = ", partial" if run.record.get("partial") else ""
    return "" if counts is None else f"n = {counts['effective']:,}{marked}"


def _with_error(metrics: Mapping[str, Any], name: str) -> str:
    value, error = _metric(metrics, name), _metric(metrics, f"{name}_stderr")
    return number(value, 4) + ("" if error is None else f" ± {number(error, 2)}")


def _metric(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(f"{name},none")
    return None if value == _MISSING else real(value)
