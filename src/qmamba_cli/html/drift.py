"""The page of `qmamba drift`, from its JSON alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from qmamba_cli.html.charts import Series, line_chart
from qmamba_cli.html.grids import heat_map
from qmamba_cli.html.page import Block, Column, Figure, Section, Table, Text, render_page
from qmamba_cli.html.scale import number, percent, real

_TITLES = {"prefill": "Prefill: one pass to each length", "decode": "Decode: token by token"}


def drift_page(record: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        record: what `qmamba drift --json` prints.
    """
    context, n = record["qmamba"], record["n"]
    facts = {
        "model": context["model"]["source"],
        "weights": context["weights"],
        "text": context["data"] or "bundled passages",
        "streams": f"{n['streams']}{', partial' if record.get('partial') else ''}",
        "tokens a stream": f"{n['length']:,}",
        "file": context["artifact"]["digest"][:12],
        "version": context["tool_version"],
    }
    return render_page(
        f"Drift of {context['model']['source']}, {context['weights']}",
        drift_sections(record),
        lead=headline(record),
        facts=facts,
        footer="KL divergence: float model ‖ mode, mean of the tokens since the point before, in nats. "
        f"Intervals: {record['interval']}.",
    )


def headline(record: Mapping[str, Any]) -> str:
    """The finding in one sentence: the mode that decoding costs most."""
    length = record["n"]["length"]
    ends = {(one["mode"], one["path"]): one["points"][-1] for one in record["curves"]}
    # A curve that was interrupted is not compared with whole ones.
    last = {key: point for key, point in ends.items() if point["t"] == length}
    modes = [mode for mode, path in last if path == "decode" and (mode, "prefill") in last]
    if not modes:
        return ""

    def kl(mode: str, path: str) -> float:
        return real(last[mode, path]["kl"]) or 0.0

    worst = max(modes, key=lambda mode: kl(mode, "decode") - kl(mode, "prefill"))
    best = min(modes, key=lambda mode: kl(mode, "decode"))
    text = (
        f"At {length:,} tokens mode {worst} is {number(kl(worst, 'prefill'))} nats a token from the float "
        f"model after one pass and {number(kl(worst, 'decode'))} when it goes token by token"
    )
    return text + (f"; mode {best} stays at {number(kl(best, 'decode'))}." if best != worst else ".")


def drift_sections(record: Mapping[str, Any]) -> list[Section]:
    """The sections, for a page of several commands' outcomes."""
    curves = record["curves"]
    sections = [Section(heading="At the end", blocks=[_table(curves)])]
    for path, title in _TITLES.items():
        chosen = [one for one in curves if one["path"] == path]
        if chosen:
            sections.append(Section(heading=title, blocks=_charts(chosen, path)))
    return sections


def _charts(curves: Sequence[Mapping[str, Any]], path: str) -> list[Block]:
    def chart(title: str, field: str, label: str, *, band: bool = False) -> str:
        series = [
            Series(
                name=f"mode {one['mode']}",
                points=[(point["t"], real(point[field]) or 0.0) for point in one["points"]],
                band=[(float(low), float(high)) for low, high in _intervals(one)] if band else (),
            )
            for one in curves
        ]
        return line_chart(
            title, series, x_label="tokens read", y_label=label, x_powers_of_two=True, y_log=True
        )

    worst = max(curves, key=lambda one: real(one["points"][-1]["state_error"]) or 0.0)
    points = worst["points"]
    layers = len(points[-1]["state_error_layers"])
    return [
        Text(
            text="Modes whose lines lie on each other differ by less than the marks."
            if path == "prefill"
            else "An int8 state is put on its grid again at every token."
        ),
        Figure(
            svg=chart(f"KL divergence by length, {path}", "kl", "KL, nats a token", band=True),
            caption="KL to the float model, mean since the point before. Shaded: 95 % over the streams.",
        ),
        Figure(
            svg=chart(f"Error of the scan state by length, {path}", "state_error", "error of the state"),
            caption="Scan state as it leaves the call: ‖Δ‖ / ‖state of the float model‖, mean over layers.",
        ),
        Figure(
            svg=chart(f"Error of the logits by length, {path}", "logits_error", "error of the logits"),
            caption="Logits less their mean: ‖Δ‖ / ‖logits‖, mean since the point before.",
        ),
        Figure(
            svg=heat_map(
                f"Error of the scan state by layer and length, mode {worst['mode']}, {path}",
                [f"layer {layer}" for layer in range(layers)],
                [str(point["t"]) for point in points],
                [[real(point["state_error_layers"][layer]) for point in points] for layer in range(layers)],
                x_label="tokens read",
                form=lambda value: percent(value),
            ),
            caption=f"The mode with the largest error of the state, {worst['mode']}, layer by layer.",
        ),
    ]


def _intervals(one: Mapping[str, Any]) -> list[tuple[float, float]]:
    intervals = [point["kl_ci"] for point in one["points"]]
    return [] if None in intervals else intervals


def _table(curves: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in curves:
        last = one["points"][-1]
        ends = last["kl_ci"]
        rows.append(
            (
                one["mode"],
                one["path"],
                one["state"],
                f"{last['t']:,}",
                number(real(last["kl"])),
                "n/a" if ends is None else f"{number(real(ends[0]))} to {number(real(ends[1]))}",
                percent(real(last["logits_error"])),
                percent(real(last["state_error"])),
            )
        )
    return Table(
        columns=(
            Column(heading="mode"),
            Column(heading="path"),
            Column(heading="state"),
            Column(heading="tokens", number=True),
            Column(heading="KL", number=True),
            Column(heading="95 % interval", number=True),
            Column(heading="logits, error", number=True),
            Column(heading="state, error", number=True),
        ),
        rows=rows,
        caption="the last point of each curve: the second half of the tokens, the state after the last",
    )
