"""The outcome of `inspect`."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.sites import site_keys
from qmamba_cli.views.calibration import DIGEST_SHOWN
from qmamba_cli.views.export import show_parts

if TYPE_CHECKING:
    from qmamba_cli.stages.inspect import Inspection, SiteHistogram

# Heights of a bar, and what stands for them where there is no terminal that can draw them.
_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = ".:-=+*#@"
# Powers of two that a row of bars has at most, the largest values last.
_BARS = 16


def show_inspection(inspection: "Inspection", *, as_json: bool, tensors: bool = False) -> None:
    """The outcome of `inspect`.

    Args:
        inspection: the outcome.
        as_json: one JSON object, which has everything.
        tensors: list every stored tensor as well.
    """
    if as_json:
        console.write_json(inspection.to_dict())
        return
    console.facts(str(inspection.path), _facts(inspection))
    if inspection.parts:
        show_parts("", inspection.parts)
    _sites(inspection)
    if tensors:
        columns = (
            Column("tensor"),
            Column("dtype"),
            Column("shape"),
            Column("size", True),
            Column("weights"),
            Column("sha256"),
        )
        rows = [
            (
                row.name,
                row.dtype,
                " x ".join(map(str, row.shape)),
                console.size(row.bytes),
                row.scheme,
                row.sha256[:DIGEST_SHOWN],
            )
            for row in inspection.tensors
        ]
        console.table("tensors", columns, rows)


def _facts(inspection: "Inspection") -> dict[str, str]:
    manifest = inspection.manifest
    dataset = getattr(manifest, "dataset", None) or manifest.calibration.dataset  # type: ignore[union-attr]
    config = manifest.model.config
    rows = {
        "format": f"{manifest.FORMAT} {manifest.format_version}, by qmamba-cli {manifest.tool_version}",
        "digest": manifest.content_digest,
        "model": f"{manifest.model.source}, digest {manifest.model.digest[:DIGEST_SHOWN]}",
        "sizes": ", ".join(f"{name} {config[name]}" for name in ("n_layer", "d_model", "d_inner", "d_state")),
        "text": f"{dataset.dataset}, {dataset.samples} x {dataset.seqlen} tokens, seed {dataset.seed}",
    }
    quantization = getattr(manifest, "quantization", None)
    if quantization is None:
        rows["observers"] = f"alpha {manifest.alpha}, reduction {manifest.reduction}"  # type: ignore[union-attr]
        shard = getattr(manifest, "shard", None)
        if shard is not None:
            rows["shard"] = f"{shard.number} of {shard.count}, {shard.samples} samples from {shard.first}"
    else:
        group = "" if quantization.group_size is None else f", groups of {quantization.group_size}"
        recipe = "" if quantization.recipe is None else f", {quantization.recipe} recipe"
        rows["weights"] = (
            f"W{quantization.w_bits}A8{group}, embedding {quantization.embedding_bits} bits{recipe}"
        )
        rows["calibration"] = (
            f"digest {manifest.calibration.digest[:DIGEST_SHOWN]}, alpha {quantization.alpha}"  # type: ignore[union-attr]
        )
        rows["bits per weight"] = f"{inspection.bits_per_weight:.2f}"
    rows["made with"] = ", ".join(f"{name} {version}" for name, version in manifest.created_by.items())
    return rows


def _sites(inspection: "Inspection") -> None:
    manifest, histograms = inspection.manifest, inspection.histograms
    keys = site_keys(int(manifest.model.config["n_layer"] or 0))
    # The absmax of such a site is that of its largest channel.
    channels = {site: f", each of {count}" for site, count in _channel_counts(inspection).items()}
    columns = (Column("site"), Column("observer"), Column("absmax", True), Column("observations", True))
    rows = [
        (
            key,
            site.observer.value
            + ("" if site.alpha is None else f" {site.alpha}")
            + channels.get(key.rpartition(".")[2], ""),
            f"{site.absmax:.4g}",
            f"{site.observations:,}",
        )
        for key, site in ((key, manifest.sites[key]) for key in keys)
    ]
    console.table("sites", columns, rows)
    if histograms:
        # A table of its own, so that both are narrow enough for a terminal.
        heights = _BLOCKS if _draws_blocks() else _PLAIN
        drawn = (Column("site"), Column("by powers of two"), Column("up to", True), Column("clipped", True))
        caption = (
            "one bar a power of two up to the largest value; its height is the logarithm of the elements"
        )
        console.table("|x|", drawn, [_drawn(key, histograms[key], heights) for key in keys], caption)


def _drawn(site: str, histogram: "SiteHistogram", heights: str) -> tuple[str, ...]:
    clipped = f"{histogram.clipped:.2%}" if histogram.clipped else ""
    return site, bars(histogram.counts[-_BARS:], heights), f"{histogram.observed:.4g}", clipped


def _channel_counts(inspection: "Inspection") -> dict[str, int]:
    """Site → number of its channels, where each has a scale."""
    return {
        row.name.removeprefix("scales."): row.shape[1]
        for row in inspection.tensors
        if row.name.startswith("scales.") and len(row.shape) == 2
    }


def bars(counts: Sequence[int], heights: str) -> str:
    """One character a count, by its logarithm: a blank for none, the lowest bar for one.

    >>> bars([0, 1, 10, 100, 1000], "123456789")
    ' 1369'
    """
    largest = math.log(max(counts, default=1)) or 1.0
    top = len(heights) - 1
    return "".join(heights[int(top * math.log(count) / largest)] if count > 0 else " " for count in counts)


def _draws_blocks() -> bool:
    """Whether stdout is a terminal whose characters include the bars."""
    return sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
