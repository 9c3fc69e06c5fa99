"""The sections of the two artifacts, from what `qmamba inspect --json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from qmamba_cli.html.charts import Bar, bar_chart
from qmamba_cli.html.grids import heat_map
from qmamba_cli.html.page import Block, Column, Figure, Table, Text
from qmamba_cli.html.scale import number, percent, real


def calibration_blocks(record: Mapping[str, Any]) -> list[Block]:
    """What was observed, and how much of each tensor its scale clips.

    Args:
        record: what `inspect` says of a calibration.
    """
    manifest, histograms = record["manifest"], record["histograms"]
    dataset = manifest["dataset"]
    text = (
        f"{dataset['samples']:,} samples of {dataset['seqlen']:,} tokens, {dataset['tokens']:,} in all, of "
        f"{dataset['dataset']}, seed {dataset['seed']}; alpha {manifest['alpha']:g}, reduction "
        f"{manifest['reduction']}; {len(manifest['sites'])} sites; qmamba {manifest['tool_version']}."
    )
    shard = manifest.get("shard")
    if shard is not None:
        text += f" Shard {shard['number']} of {shard['count']}: it stands for a part of the text only."
    blocks: list[Block] = [Text(text=text)]
    kept = {key: _kept(one) for key, one in histograms.items()}
    layers = sorted({layer for layer, _name in map(_split, histograms) if layer is not None})
    names = list(dict.fromkeys(name for layer, name in map(_split, histograms) if layer is not None))
    if layers:
        values = [[kept.get(f"layers.{layer}.{name}") for layer in layers] for name in names]
        chart = heat_map(
            "Share of the largest magnitude that the grid holds",
            names,
            [str(layer) for layer in layers],
            values,
            x_label="layer",
            reverse=True,
            form=lambda value: percent(value),
        )
        caption = "Chosen absmax / largest |x| seen; the darkest is clipped furthest, 100 % not at all."
        blocks.append(Figure(svg=chart, caption=caption))
    return [*blocks, _clips(manifest["sites"], histograms, kept)]


def _clips(
    sites: Mapping[str, Any], histograms: Mapping[str, Any], kept: Mapping[str, float | None]
) -> Table:
    by_name: dict[str, list[str]] = {}
    for key in histograms:
        by_name.setdefault(_split(key)[1], []).append(key)
    rows = []
    for name, keys in by_name.items():
        worst = min(keys, key=lambda key: 1.0 if kept[key] is None else float(kept[key] or 0.0))
        one = histograms[worst]
        rows.append(
            (
                name,
                sites[worst]["observer"],
                worst.rpartition(f".{name}")[0] if real(one["clipped"]) else "",
                number(real(one["observed"])),
                number(real(one["absmax"])),
                percent(kept[worst]),
                percent(real(one["clipped"])),
                f"{sites[worst]['observations']:,}",
            )
        )
    return Table(
        columns=(
            Column(heading="site"),
            Column(heading="observer"),
            Column(heading="most clipped"),
            Column(heading="largest", number=True),
            Column(heading="absmax", number=True),
            Column(heading="of the largest", number=True),
            Column(heading="values beyond", number=True),
            Column(heading="n", number=True),
        ),
        rows=rows,
        caption="of each kind of site the one whose scale clips furthest; n: elements seen there",
    )


def quantized_blocks(record: Mapping[str, Any]) -> list[Block]:
    """How the weights were quantized, and where the bytes are.

    Args:
        record: what `inspect` says of a quantized model.
    """
    manifest = record["manifest"]
    how = manifest["quantization"]
    total = sum(part["bytes"] for part in record["parts"])
    group = "one scale a row" if how["group_size"] is None else f"groups of {how['group_size']}"
    recipe = f", {how['recipe']} recipe" if how.get("recipe") else ""
    shape = manifest["tensors"].get("scales.x_proj:input", {}).get("shape", ())
    channels = f", u with a scale for each of {shape[1]} channels" if len(shape) == 2 else ""
    text = (
        f"W{how['w_bits']}A8{recipe}, {group}{channels}, embedding {how['embedding_bits']} bits, "
        f"alpha {how['alpha']:g}; {size(total)} in {len(manifest['tensors'])} tensors, "
        f"{number(real(record['bits_per_weight']))} bits a weight; qmamba {manifest['tool_version']}."
    )
    if how["ignore"]:
        text += f" Not quantized: {', '.join(how['ignore'])}."
    bars = [
        Bar(label=part["part"], value=part["bytes"] / 1e6, note=_bits(part["bits_per_weight"]))
        for part in record["parts"]
        if part["bytes"] >= total / 1000
    ]
    chart = bar_chart("Size by part", bars, unit="megabytes")
    caption = "Megabytes (10⁶ bytes) and bits a weight; parts under a thousandth of the whole are left out."
    return [Text(text=text), Figure(svg=chart, caption=caption)]


def size(count: int) -> str:
    """Bytes for people.

    >>> size(172), size(5_473_108)
    ('172 bytes', '5.47 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    units: Sequence[tuple[float, str]] = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    step, unit = next((step, unit) for step, unit in units if count >= step)
    return f"{number(count / step)} {unit}"


def _bits(bits: float | None) -> str:
    return "" if bits is None else f"{number(real(bits))} bits"


def _kept(histogram: Mapping[str, Any]) -> float | None:
    observed = float(histogram["observed"])
    return min(1.0, float(histogram["absmax"]) / observed) if observed > 0 else None


def _split(key: str) -> tuple[int | None, str]:
    """Layer and site of a key; no layer for the head.

    >>> _split("layers.5.x_proj:input"), _split("lm_head:input")
    ((5, 'x_proj:input'), (None, 'lm_head:input'))
    """
    head, _, rest = key.partition(".")
    layer, _, name = rest.partition(".")
    return (int(layer), name) if head == "layers" and layer.isdigit() else (None, key)
