"""The page of `qmamba sensitivity`, from its JSON alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from qmamba_cli.html.charts import Bar, bar_chart
from qmamba_cli.html.grids import heat_map, histogram
from qmamba_cli.html.page import Block, Column, Figure, Section, Table, Text, render_page
from qmamba_cli.html.scale import number, percent, real

# Bars of a chart of single layers, which may have hundreds of rows.
_LAYER_BARS = 16
_ACTIVATION, _WEIGHT = 0, 1


def sensitivity_page(record: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        record: what `qmamba sensitivity --json` prints.
    """
    context, n = record["qmamba"], record["n"]
    everything = record["everything"]
    facts = {
        "model": context["model"]["source"],
        "weights": context["weights"],
        "alpha": f"{context['alpha']:g}",
        "task": context["task"],
        "documents": f"{n['documents']} of {n['original']}{', partial' if record.get('partial') else ''}",
        "scored tokens": f"{n['tokens']:,}",
        "everything quantized": f"KL {number(real(everything['kl']))} nats a token",
        "calibration": context["calibration"]["digest"][:12],
        "version": context["tool_version"],
    }
    return render_page(
        f"Sensitivity of {context['model']['source']}, {context['weights']}",
        sensitivity_sections(record),
        lead=headline(record),
        facts=facts,
        footer="KL divergence: float model ‖ quantized model, mean, nats a token. Intervals: "
        f"{record['interval']}. Fake quantization of the rotated float model; all sites together are mode 0.",
    )


def headline(record: Mapping[str, Any]) -> str:
    """The finding in two sentences."""
    rows = record["sites"]
    if not rows:
        return ""
    worst = rows[0]
    alone = number(real(worst["kl"]))
    total = number(real(record["everything"]["kl"]))
    text = (
        f"Quantizing {_label(worst)} alone costs {alone} nats a token, {percent(real(worst['share']))} of "
        f"what all tensors cost one by one; everything quantized costs {total}."
    )
    if record["leave_one_out"]:
        best = record["leave_one_out"][0]
        text += (
            f" Leaving only {_label(best)} float brings that down to {number(real(best['kl']))}, "
            f"{percent(real(best['share']))} less."
        )
    return text


def sensitivity_sections(record: Mapping[str, Any]) -> list[Section]:
    """The sections, for a page of several commands' outcomes."""
    sites = [row for row in record["sites"] if row["layer"] is None]
    layers = [row for row in record["sites"] if row["layer"] is not None]
    sections = []
    # With single layers only, the one row of the whole model stands among theirs.
    if len(sites) > 1:
        sections.append(Section(heading="One tensor at a time", blocks=_alone(sites)))
    if record["leave_one_out"]:
        sections.append(Section(heading="Everything but one", blocks=_left_out(record)))
    if record.get("per_token"):
        sections.append(Section(heading="One scale a token", blocks=_per_token(record)))
    if layers:
        blocks = _layers(record["sites"], layers, record["qmamba"]["layers"])
        sections.append(Section(heading="Layer by layer", blocks=blocks))
    if record["parts"]:
        sections.append(Section(heading="Tensors that share a scale", blocks=[_parts(record["parts"])]))
    if record["histograms"]:
        sections.append(Section(heading="The worst activations", blocks=_histograms(record["histograms"])))
    return sections


def _alone(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    chart = bar_chart(
        "KL divergence with one tensor quantized in all layers",
        [_bar(row, percent(real(row["share"]))) for row in rows],
        unit="KL to the float model, nats a token",
    )
    return [
        Text(
            text="Each tensor is quantized in all layers at once while everything else stays float. The scan "
            "state is put on its grid every 64 tokens; generation does so at every token, which "
            "qmamba drift measures."
        ),
        Figure(
            svg=chart,
            caption="Blue: activations. Orange: weights. Percent of the sum of all rows. Whiskers: 95 %.",
        ),
        _table(rows, "share: of the sum of all rows; SQNR: mean of the layers'; clipped: of all values"),
    ]


def _left_out(record: Mapping[str, Any]) -> list[Block]:
    return _beside_everything(
        record,
        record["leave_one_out"],
        base="nothing left out",
        title="KL divergence with everything quantized but one tensor",
        text="Everything is quantized but one tensor, which stays float in all layers: what a finer grid can "
        "win.",
        caption="Percent: change against everything quantized.",
    )


def _per_token(record: Mapping[str, Any]) -> list[Block]:
    return _beside_everything(
        record,
        record["per_token"],
        base="one scale a tensor",
        title="KL divergence with one scale a token for one tensor",
        text="Everything is quantized; one tensor takes the largest magnitude of each token over its "
        "channels as that token's clip, in place of one clip for all tokens.",
        caption="Percent: change against one scale a tensor everywhere.",
    )


def _beside_everything(
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    base: str,
    title: str,
    text: str,
    caption: str,
) -> list[Block]:
    """One tensor changed at a time, beside everything quantized, whose bar is called ``base``."""
    everything = record["everything"]
    bars = [Bar(label=base, value=real(everything["kl"]), interval=_interval(everything), tone=7)]
    bars += [_bar(row, percent(-(real(row["share"]) or 0.0), sign=True)) for row in rows]
    chart = bar_chart(title, bars, unit="KL to the float model, nats a token")
    return [Text(text=text), Figure(svg=chart, caption=caption), _gains(rows)]


def _gains(rows: Sequence[Mapping[str, Any]]) -> Table:
    def ends(interval: Sequence[Any] | None) -> str:
        return "n/a" if interval is None else " to ".join(number(real(end)) for end in interval)

    return Table(
        columns=(
            Column(heading="tensor"),
            Column(heading="KL", number=True),
            Column(heading="95 % interval", number=True),
            Column(heading="gain", number=True),
            Column(heading="95 % interval", number=True),
            Column(heading="Δ log-likelihood", number=True),
        ),
        rows=[
            (
                _label(row),
                number(real(row["kl"])),
                ends(row["kl_ci"]),
                number(real(row.get("gain"))),
                ends(row.get("gain_ci")),
                number(real(row["delta_ll"])),
            )
            for row in rows
        ],
        caption="gain: KL of everything quantized less this, paired, nats a token",
    )


def _layers(
    ranked: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], layers: int
) -> list[Block]:
    names = list(dict.fromkeys(row["site"] for row in rows))
    columns = [str(layer) for layer in range(layers)]
    cells = {(row["site"], row["layer"]): row for row in rows}

    def grid(field: str) -> list[list[float | None]]:
        return [
            [real(cells[name, layer][field]) if (name, layer) in cells else None for layer in range(layers)]
            for name in names
        ]

    worst = [row for row in ranked if row["layer"] is not None][:_LAYER_BARS]
    return [
        Figure(
            svg=heat_map(
                "KL divergence by layer and tensor", names, columns, grid("kl"), x_label="layer", log=True
            ),
            caption="KL to the float model, nats a token, this one tensor quantized; logarithmic shades.",
        ),
        Figure(
            svg=heat_map(
                "Signal-to-noise ratio by layer and tensor",
                names,
                columns,
                grid("sqnr_db"),
                x_label="layer",
                reverse=True,
                form=lambda value: "n/a" if value is None else f"{value:.0f}",
            ),
            caption="Signal-to-quantization-noise ratio in decibels; the darkest loses most.",
        ),
        Figure(
            svg=bar_chart(
                "The most expensive single tensors",
                [_bar(row, percent(real(row["share"]))) for row in worst],
                unit="KL to the float model, nats a token",
            ),
            caption="Percent of the sum over all single tensors.",
        ),
        _table(worst, "SQNR and clip rate are the tensor's own, seen in the float model"),
    ]


def _parts(rows: Sequence[Mapping[str, Any]]) -> Table:
    return _table(rows, "in all layers at once; every part keeps the scale that its site has")


def _histograms(histograms: Sequence[Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = [
        Text(text="Magnitudes that calibration saw. Values beyond the clip line saturate.")
    ]
    for item in histograms:
        clip, absmax = float(item["clip"]), float(item["absmax"])
        reach = (
            "nothing is clipped" if clip >= absmax else f"clipped at {percent(clip / absmax)} of the maximum"
        )
        name = f"layer {item['layer']}, {item['site']}"
        chart = histogram(
            f"Magnitudes of {name}", item["edges"], item["counts"], clip=clip, x_label="magnitude"
        )
        caption = f"{name}: {reach}; SQNR {number(real(item['sqnr_db']))} dB."
        blocks.append(Figure(svg=chart, caption=caption))
    return blocks


def _table(rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
    return Table(
        columns=(
            Column(heading="tensor"),
            Column(heading="KL", number=True),
            Column(heading="95 % interval", number=True),
            Column(heading="share", number=True),
            Column(heading="Δ log-likelihood", number=True),
            Column(heading="SQNR, dB", number=True),
            Column(heading="clipped", number=True),
        ),
        rows=[
            (
                _label(row),
                number(real(row["kl"])),
                "n/a" if (ends := _interval(row)) is None else f"{number(ends[0])} to {number(ends[1])}",
                percent(real(row["share"])),
                number(real(row["delta_ll"])),
                number(real(row["sqnr_db"])),
                percent(real(row["clip_rate"])),
            )
            for row in rows
        ],
        caption=caption,
    )


def _bar(row: Mapping[str, Any], note: str) -> Bar:
    tone = _WEIGHT if row["site"].endswith(".weight") else _ACTIVATION
    return Bar(label=_label(row), value=real(row["kl"]), interval=_interval(row), tone=tone, note=note)


def _label(row: Mapping[str, Any]) -> str:
    name = row["site"] if row.get("part") is None else f"{row['site']}[{row['part']}]"
    return name if row["layer"] is None else f"layer {row['layer']}, {name}"


def _interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    ends = row["kl_ci"]
    return None if ends is None else (float(ends[0]), float(ends[1]))
