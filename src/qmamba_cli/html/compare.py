"""The page of `qmamba compare`, from its JSON alone but for the distribution of the divergence."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from qmamba_cli.html.charts import Bar, Series, bar_chart, line_chart
from qmamba_cli.html.page import Block, Column, Figure, Items, Section, Table, Text, render_page
from qmamba_cli.html.scale import number, percent, real

# With more pairs than these, only those with the first two modes are spelled out.
_MOST_VERDICTS = 21
# Lines of one chart that can be told apart.
_MOST_LINES = 8


def compare_page(record: Mapping[str, Any], charts: Mapping[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        record: what `qmamba compare --json` prints.
        charts: what `evaluation.compare.chart_data` gives, or None.
    """
    context = record["qmamba"]
    facts = {
        "model": context["model"]["source"],
        "weights": context["weights"],
        "alpha": f"{context['alpha']:g}",
        "task": context["task"]["task"],
        "n": amount(record),
        "file": context["artifact"]["digest"][:12],
        "calibration": context["calibration"]["digest"][:12],
        "computed on": context["backend"],
        "version": context["tool_version"],
    }
    return render_page(
        f"Modes of {context['model']['source']}, {context['weights']}",
        compare_sections(record, charts),
        lead=headline(record),
        facts=facts,
        footer=method(record),
    )


def amount(record: Mapping[str, Any]) -> str:
    """How much was scored, in words."""
    context = record["qmamba"]
    counts = context["documents"]
    unit = context["statistics"]["cluster"]
    text = f"{context['tokens']:,} tokens in {counts['effective']:,} of {counts['original']:,} {unit}s"
    return f"{text}, partial" if record.get("partial") else text


def method(record: Mapping[str, Any]) -> str:
    """How the modes were told apart, in one sentence."""
    statistics = record["qmamba"]["statistics"]
    return (
        f"KL divergence: float model ‖ mode. Intervals: {statistics['confidence']:.0%}, "
        f"{statistics['interval']}, {statistics['resamples']:,} draws of whole {statistics['cluster']}s; "
        f"accuracy: {statistics['accuracy_test']}; {statistics['tests']} pairs, "
        f"correction: {statistics['correction']}."
    )


def groups(record: Mapping[str, Any]) -> list[list[str]]:
    """Names of the modes, those with the same bits in one list."""
    twins = {(pair["a"], pair["b"]) for pair in record["pairs"] if pair["identical"]}
    found: list[list[str]] = []
    for name in record["modes"]:
        group = next((one for one in found if (one[0], name) in twins), None)
        if group is None:
            found.append([name])
        else:
            group.append(name)
    return found


def headline(record: Mapping[str, Any]) -> str:
    """The finding in a few words: the mode nearest to the float model, and whether that is certain."""
    leaders = [group[0] for group in groups(record) if _divergence(record["modes"][group[0]]) is not None]
    quantized = [name for name in leaders if record["modes"][name].get("kl_ci") is not None]
    if len(quantized) < 2:
        return ""
    order = sorted(quantized, key=lambda name: _divergence(record["modes"][name]) or 0.0)
    best, worst = order[0], order[-1]
    text = f"Nearest to the float model is mode {best}, {_with_interval(record['modes'][best])} nats a token"
    text += f"; furthest is mode {worst}, {_with_interval(record['modes'][worst])}"
    pair = _pair(record, best, worst)
    return f"{text}. {_capital(pair['verdict'])}." if pair is not None else f"{text}."


def compare_sections(record: Mapping[str, Any], charts: Mapping[str, Any] | None = None) -> list[Section]:
    """The sections, for a page of several commands' outcomes."""
    blocks: list[Block] = []
    modes = record["modes"]
    # Modes with the same bits are one model: one bar.
    bars = [
        Bar(
            label=" = ".join(group),
            value=real(modes[group[0]]["kl_mean"]),
            interval=_interval(modes[group[0]]["kl_ci"]),
        )
        for group in groups(record)
        if modes[group[0]].get("kl_ci") is not None
    ]
    if bars:
        chart = bar_chart("KL divergence by mode", bars, unit="KL to the float model, nats a token")
        blocks.append(Figure(svg=chart, caption=f"Whiskers: {_confidence(record)}. n: {amount(record)}."))
    blocks.append(_modes(record))
    sections = [Section(heading="Modes", blocks=blocks)]
    if record["pairs"]:
        sections.append(Section(heading="What separates them", blocks=_verdicts(record)))
    if charts and charts.get("kl_counts"):
        sections.append(Section(heading="Single tokens", blocks=[_distribution(record, charts)]))
    return sections


def _modes(record: Mapping[str, Any]) -> Table:
    compared = any("kl_mean" in metrics for metrics in record["modes"].values())
    columns = [
        Column(heading="mode"),
        Column(heading="accuracy", number=True),
        Column(heading="perplexity", number=True),
    ]
    if compared:
        headings = ("KL", "95 % interval", "median", "99 %", "largest", "same top-1", "Δ log-likelihood")
        columns += [Column(heading=heading, number=True) for heading in headings]
    rows = []
    for name, metrics in record["modes"].items():
        error = real(metrics["acc_stderr"])
        row = [
            name,
            f"{percent_of(metrics['acc'])}{'' if error is None else f' ± {100 * error:.1f}'}",
            number(real(metrics["perplexity"]), 4),
        ]
        if compared:
            row += [number(_divergence(metrics)), _ends(metrics.get("kl_ci"))]
            row += [number(real(metrics[key])) for key in ("kl_median", "kl_p99", "kl_max")]
            row += [percent_of(metrics["same_top1"]), number(real(metrics.get("delta_ll", 0.0)))]
        rows.append(row)
    return Table(
        columns=columns,
        rows=rows,
        caption=f"{amount(record)}; ±: standard error; Δ log-likelihood: to the float model, nats a token",
    )


def _verdicts(record: Mapping[str, Any]) -> list[Block]:
    same = [" = ".join(group) + ", bit for bit" for group in groups(record) if len(group) > 1]
    leaders = [group[0] for group in groups(record)]
    pairs = [pair for pair in record["pairs"] if pair["a"] in leaders and pair["b"] in leaders]
    first = leaders[:2]
    shown = [pair for pair in pairs if len(pairs) <= _MOST_VERDICTS or pair["a"] in first]
    blocks: list[Block] = [
        Items(lines=[_capital(line) + "." for line in (*same, *(p["verdict"] for p in shown))])
    ]
    if len(shown) < len(pairs):
        rest = len(pairs) - len(shown)
        blocks.append(Text(text=f"{rest} more pairs are in the table below and in words in the file."))
    return [*blocks, _pairs(pairs)]


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> Table:
    compared = any("delta_kl" in pair for pair in pairs)
    columns = [Column(heading="a"), Column(heading="b")]
    headings = ["Δ log-likelihood", "95 % interval", "p"]
    headings += ["Δ KL", "95 % interval", "p"] if compared else []
    headings += ["only a", "only b", "McNemar p"]
    columns += [Column(heading=heading, number=True) for heading in headings]
    rows = []
    for pair in pairs:
        measures = ("delta_ll", "delta_kl") if compared else ("delta_ll",)
        row = [pair["a"], pair["b"]]
        for key in measures:
            row += [
                number(real(pair.get(key))),
                _ends(pair.get(f"{key}_ci")),
                p(pair.get(f"{key}_p_corrected")),
            ]
        row += [str(pair.get("only_a", 0)), str(pair.get("only_b", 0)), p(pair.get("mcnemar_p_corrected"))]
        rows.append(row)
    caption = (
        "differences are a - b, in nats a token; only a, only b: answers that one of them alone has right; "
        "every p is corrected"
    )
    return Table(columns=columns, rows=rows, caption=caption)


def _distribution(record: Mapping[str, Any], charts: Mapping[str, Any]) -> Figure:
    edges = [math.log10(edge) for edge in charts["kl_edges"]]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    names = [group[0] for group in groups(record) if record["modes"][group[0]].get("kl_ci") is not None]
    series = []
    for name in names[:_MOST_LINES]:
        counts = charts["kl_counts"][name]
        total = sum(counts) or 1
        shares = [100 * count / total for count in counts]
        series.append(Series(name=name, points=list(zip(middles, shares, strict=True))))
    chart = line_chart(
        "KL divergence of single tokens",
        series,
        x_label="log₁₀ of the KL divergence of one token, in nats",
        y_label="% of the tokens",
    )
    return Figure(svg=chart, caption="The mean is made by the few tokens far on the right.")


def _pair(record: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any] | None:
    for pair in record["pairs"]:
        if {pair["a"], pair["b"]} == {a, b}:
            found: Mapping[str, Any] = pair
            return found
    return None


def _divergence(metrics: Mapping[str, Any]) -> float | None:
    return real(metrics.get("kl_mean"))


def _with_interval(metrics: Mapping[str, Any]) -> str:
    return f"KL {number(_divergence(metrics))} ({_ends(metrics['kl_ci'])})"


def _interval(ends: Sequence[Any] | None) -> tuple[float, float] | None:
    return None if ends is None else (float(ends[0]), float(ends[1]))


def _ends(ends: Sequence[Any] | None) -> str:
    return "n/a" if ends is None else f"{number(real(ends[0]))} to {number(real(ends[1]))}"


def _confidence(record: Mapping[str, Any]) -> str:
    return f"{100 * record['qmamba']['statistics']['confidence']:.0f} %"


def percent_of(share: float | str) -> str:
    """A share with one decimal, so that it and a standard error beside it have the same digits.

    >>> percent_of(0.98765), percent_of("nan")
    ('98.8 %', 'n/a')
    """
    value = float(share)
    return f"{100 * value:.1f} %" if math.isfinite(value) else percent(None)


def p(value: float | None) -> str:
    """A p-value.

    >>> p(0.0002), p(0.04), p(None)
    ('< 0.001', '0.04', 'n/a')
    """
    return "n/a" if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
