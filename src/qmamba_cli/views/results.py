"""The outcome of `run --task`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmamba_cli import console
from qmamba_cli.console import Column

# How much of lm-eval's layout a person wants to see, and in what order.
_METRICS = ("acc", "perplexity", "bits_per_token", "top1_acc", "kl", "same_top1")


def show_results(results: Mapping[str, Any], *, output: Path | None, as_json: bool) -> None:
    """The outcome of `run --task`."""
    if as_json:
        from qmamba_cli.evaluation.results import to_json

        console.write(to_json(results))
        return
    extra = results["qmamba"]
    for task, metrics in results["results"].items():
        counts = results["n-samples"][task]
        marked = ", partial" if results.get("partial") else ""
        title = (
            f"{task}: mode {extra['mode']['name']}, {extra['weights']}, {extra['backend']}, "
            f"{counts['effective']} of {counts['original']}{marked}, {extra['seconds']:.1f} s"
        )
        columns = (Column("metric"), Column("value", True), Column("standard error", True))
        rows = [
            (name, _number(metrics[f"{name},none"]), _number(metrics.get(f"{name}_stderr,none")))
            for name in _METRICS
            if f"{name},none" in metrics
        ]
        console.table(title, columns, rows)
    if output is not None:
        console.note(f"results written to {output}")


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.5g}"
