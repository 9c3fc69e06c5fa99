"""The outcomes of `inspect` and `verify`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.errors import (
    ArtifactError,
)
from qmamba_cli.sites import site_keys
from qmamba_cli.views.calibration import DIGEST_SHOWN
from qmamba_cli.views.export import show_parts

if TYPE_CHECKING:
    from qmamba_cli.stages.inspect import Check, Inspection


def show_inspection(inspection: "Inspection", *, as_json: bool) -> None:
    """The outcome of `inspect`."""
    if as_json:
        console.write_json(inspection.to_dict())
        return
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
    else:
        group = "" if quantization.group_size is None else f", groups of {quantization.group_size}"
        rows["weights"] = f"W{quantization.w_bits}A8{group}, embedding {quantization.embedding_bits} bits"
        rows["calibration"] = (
            f"digest {manifest.calibration.digest[:DIGEST_SHOWN]}, alpha {quantization.alpha}"  # type: ignore[union-attr]
        )
        rows["bits per weight"] = f"{inspection.bits_per_weight:.2f}"
    rows["made with"] = ", ".join(f"{name} {version}" for name, version in manifest.created_by.items())
    console.facts(str(inspection.path), rows)
    if inspection.parts:
        show_parts("", inspection.parts)
    columns = (Column("site"), Column("observer"), Column("absmax", True), Column("observations", True))
    sites = [
        (
            key,
            site.observer.value + ("" if site.alpha is None else f" {site.alpha}"),
            f"{site.absmax:.4g}",
            f"{site.observations:,}",
        )
        for key, site in ((key, manifest.sites[key]) for key in site_keys(int(config["n_layer"] or 0)))
    ]
    console.table("sites", columns, sites)


def show_checks(path: Path, checks: "Sequence[Check]", *, as_json: bool) -> None:
    """The outcome of `verify`.

    Raises:
        ArtifactError: a check failed.
    """
    failed = [check for check in checks if check.verdict.value == "failed"]
    if as_json:
        rows = [{"what": row.what, "verdict": row.verdict.value, "detail": row.detail} for row in checks]
        console.write_json({"path": str(path), "ok": not failed, "checks": rows})
    else:
        columns = (Column("check"), Column("verdict"), Column("detail"))
        console.table(
            f"verify {path}", columns, [(row.what, row.verdict.value, row.detail) for row in checks]
        )
    if failed:
        raise ArtifactError(
            f"{failed[0].what} failed: {failed[0].detail}",
            hint="copy the artifact again, or make it again with `qmamba calibrate` and `qmamba export`",
        )
