"""The outcome of `bench`: tables, one JSON object, and a chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column

if TYPE_CHECKING:
    from qmamba_cli.stages.bench import BenchReport, BenchRow
    from qmamba_cli.stages.bench_measure import Spread


def show_bench(
    report: "BenchReport", *, command: str, chart: Path | None, force: bool, as_json: bool
) -> None:
    """Show the times and write the chart.

    Args:
        report: what was measured.
        command: the command line that made it.
        chart: HTML file to write, or None.
        force: whether an existing chart may be replaced.
        as_json: one JSON object in place of the tables.
    """
    from qmamba_cli.evaluation.results import json_safe

    record = json_safe({"command": command, **report.to_dict()})
    if chart is not None:
        from qmamba_cli.html.bench import bench_page
        from qmamba_cli.stages.reports import save_reports

        save_reports({chart: bench_page(record)}, force=force)
    if as_json:
        console.write_json(record)
    else:
        _tables(report, command)
    if chart is not None:
        console.note(f"chart written to {chart}")


def _tables(report: "BenchReport", command: str) -> None:
    columns: tuple[Column, ...] = (
        Column("mode"),
        Column("weights"),
        Column("batch", True),
        Column("prompt", True),
        Column("first token ms", True),
        Column("x float", True),
        Column("ms/token", True),
        Column("x float", True),
        Column("tokens/s", True),
        Column("generated/s", True),
        Column("GPU memory", True),
    )
    if all(row.measured is None or row.measured.decode_gpu_bytes is None for row in report.rows):
        columns = columns[:-1]
    cells = [_cells(row)[: len(columns)] for row in report.rows]
    settings = report.settings
    caption = [
        f"medians and quartiles of {settings['repeat']} prompts and {settings['new_tokens']} steps; x float: "
        "the float row's time over this one's; generated/s: as a reader of the tokens sees it",
        *report.notes,
        *(
            f"mode {row.mode}, {row.weights}, batch {row.batch_size}: {row.error}"
            for row in report.rows
            if row.error
        ),
    ]
    title = f"{report.model}, partial" if report.partial else report.model
    console.table(title, columns, cells, caption="\n".join(caption))
    for row in report.rows:
        _breakdown(row)
    facts = dict(report.machine)
    if report.host_bytes is not None:
        facts["host memory"] = f"{console.size(report.host_bytes)} at most"
    facts["command"] = command
    console.facts("", facts)


def _cells(row: "BenchRow") -> Sequence[str]:
    named = (row.mode, row.weights, str(row.batch_size), str(row.prompt_length))
    if row.measured is None:
        return (*named, "-", "", "-", "", "-", "-", "-")
    measured = row.measured
    memory = ""
    if measured.prompt_gpu_bytes is not None and measured.decode_gpu_bytes is not None:
        memory = (
            f"{console.size(measured.prompt_gpu_bytes)}, decode {console.size(measured.decode_gpu_bytes)}"
        )
    return (
        *named,
        _spread(measured.first_token_ms),
        _ratio(row.first_token_speedup),
        _spread(measured.token_ms),
        _ratio(row.token_speedup),
        f"{row.tokens_per_s:,.0f}",
        f"{measured.generated_tokens_per_s:,.0f}",
        memory,
    )


def _breakdown(row: "BenchRow") -> None:
    measured = row.measured
    if measured is None or not measured.prompt_breakdown:
        return
    wholes = (sum(measured.prompt_breakdown.values()), sum(measured.decode_breakdown.values()))
    stages = dict.fromkeys((*measured.prompt_breakdown, *measured.decode_breakdown))
    cells = []
    for stage in stages:
        cell = [stage]
        for parts, whole in zip((measured.prompt_breakdown, measured.decode_breakdown), wholes, strict=True):
            ms = parts.get(stage, 0.0)
            cell += [f"{ms:.4g}", f"{ms / whole:.0%}" if whole else ""]
        cells.append(cell)
    columns = (
        Column("stage"),
        Column("prompt ms", True),
        Column("share", True),
        Column("step ms", True),
        Column("share", True),
    )
    title = f"mode {row.mode}, {row.weights}, batch {row.batch_size}, prompt {row.prompt_length}, by stage"
    caption = "operators by themselves; rest: what they leave of the whole, 0 where it is faster"
    console.table(title, columns, cells, caption=caption)


def _spread(value: "Spread") -> str:
    return f"{value.median:.4g} ({value.low:.4g}-{value.high:.4g})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
