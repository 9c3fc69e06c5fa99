"""The outcome of `compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmamba_cli import console
from qmamba_cli.console import Column

if TYPE_CHECKING:
    from qmamba_cli.stages.compare import Comparison

# With more pairs than these, only those with the first two modes are shown.
_MOST_VERDICTS = 21
_KL = ("kl_mean", "kl_median", "kl_p99", "kl_max")


def show_comparison(comparison: "Comparison", *, output: Path | None, as_json: bool) -> None:
    """The table of modes, which of them are the same, and a verdict on every pair of the others."""
    results = comparison.results
    if as_json:
        from qmamba_cli.evaluation.results import to_json

        console.write(to_json(results))
    else:
        from qmamba_cli.html.compare import groups as twins_of

        _table(results)
        groups = twins_of(results)
        _verdicts(results, groups)
    for note in comparison.notes:
        console.note(note)
    if output is not None:
        console.note(f"results written to {output}")


def _table(results: Mapping[str, Any]) -> None:
    extra = results["qmamba"]
    modes: Mapping[str, Mapping[str, Any]] = results["modes"]
    compared = any("kl_mean" in metrics for metrics in modes.values())
    columns = [
        Column("mode"),
        Column("accuracy", True),
        Column("perplexity", True),
        Column("bits/token", True),
    ]
    if compared:
        columns += [
            Column("KL mean", True),
            Column("median", True),
            Column("99 %", True),
            Column("max", True),
            Column("same top-1", True),
        ]
    rows = []
    for name, metrics in modes.items():
        error = metrics["acc_stderr"]
        row = [
            name,
            f"{metrics['acc']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            f"{metrics['perplexity']:.5g}",
            f"{metrics['bits_per_token']:.4f}",
        ]
        if compared:
            row += [f"{metrics[name]:.5f}" for name in _KL]
            row.append(f"{metrics['same_top1']:.4f}")
        rows.append(row)
    counts = extra["documents"]
    marked = ", partial" if results.get("partial") else ""
    caption = (
        f"± is one standard error; KL in nats a token, over {extra['tokens']} {extra['scored']}; "
        f"batch size {extra['batch_size']}, {extra['seconds']:.1f} s"
    )
    console.table(
        f"{extra['task']['task']}: {extra['weights']}, {extra['backend']}, "
        f"{counts['effective']} of {counts['original']}{marked}",
        columns,
        rows,
        caption=caption,
    )


def _verdicts(results: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> None:
    lines = [" = ".join(group) + ", bit for bit" for group in groups if len(group) > 1]
    leaders = [group[0] for group in groups]
    pairs = [pair for pair in results["pairs"] if pair["a"] in leaders and pair["b"] in leaders]
    shown = [pair for pair in pairs if len(pairs) <= _MOST_VERDICTS or pair["a"] in leaders[:2]]
    lines += [pair["verdict"] for pair in shown]
    if len(shown) < len(pairs):
        lines.append(f"({len(pairs) - len(shown)} more verdicts in `--json` and `--output`)")
    statistics = results["qmamba"]["statistics"]
    lines.append(
        f"({statistics['interval']}, {statistics['resamples']} draws of whole {statistics['cluster']}s; "
        f"{statistics['accuracy_test']}; {statistics['tests']} pairs, correction: {statistics['correction']})"
    )
    console.write("".join(f"{line}\n" for line in lines))
