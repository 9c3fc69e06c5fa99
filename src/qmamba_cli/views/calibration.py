"""The outcome of `calibrate` and of `merge`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qmamba_cli import console

if TYPE_CHECKING:
    from qmamba_cli.config import MambaConfig
    from qmamba_cli.evaluation.overlap import Overlap
    from qmamba_cli.quant.coverage import CoverageReport
    from qmamba_cli.stages.calibrate import CalibrateReport
    from qmamba_cli.stages.estimate import Estimate

# Characters of a digest that people are shown.
DIGEST_SHOWN = 12
# What stands behind the time that a dry run tells.
GUESS = "(an estimate; half or twice that is possible)"


def show_calibration(report: "CalibrateReport", *, as_json: bool, dry_run: bool = False) -> None:
    """The outcome of `calibrate` or `merge`; what calls for attention goes to stderr as well."""
    if as_json:
        console.write_json(_as_json(report, dry_run=dry_run))
    else:
        console.facts("calibration (dry run)" if dry_run else "calibration", _rows(report, dry_run=dry_run))
    for warning in _warnings(report):
        console.note(f"warning: {warning}")


def _rows(report: "CalibrateReport", *, dry_run: bool) -> dict[str, str]:
    clip = report.widest_clip
    rows = {
        "artifact": f"{report.path} (not written)" if dry_run else str(report.path),
        "digest": report.digest[:DIGEST_SHOWN],
        "sites": str(report.sites),
        "samples": str(report.samples),
        "tokens": f"{report.tokens:,}",
        "widest clip": "none"
        if clip is None
        else f"{clip[0]} at {clip[1]:.4g}, {clip[1] / clip[2]:.0%} of its maximum",
        "device": report.device,
    }
    if report.resumed_at is not None:
        rows["continued"] = f"from sample {report.resumed_at}"
    if report.skipped_short:
        rows["too short"] = f"{report.skipped_short:,} rows passed over"
    if report.coverage is not None:
        rows["coverage"] = _coverage(report.coverage)
    if report.overlap is not None:
        rows["overlap"] = _overlap(report.overlap)
    if dry_run:
        del rows["digest"], rows["widest clip"]
    if report.estimate is not None:
        rows |= _estimate(report.estimate)
    return rows


def _coverage(coverage: "CoverageReport") -> str:
    """In words: what still grew, and the channels that stand out."""
    growing = coverage.growing
    parts = ["no maximum grew in the last tenth of the samples"]
    if growing:
        first = growing[0]
        parts = [
            f"{len(growing)} of {len(coverage.sites)} maxima grew in the last tenth of the samples, "
            f"most {first.site} by {first.growth or 0.0:.1%}"
        ]
    outliers = [(len(row.outliers), row.site) for row in coverage.sites if row.outliers]
    if outliers:
        count = sum(found for found, _ in outliers)
        parts.append(f"{count} outlier channels, most at {max(outliers)[1]}")
    return "; ".join(parts)


def _overlap(overlap: "Overlap") -> str:
    judged = overlap.documents - overlap.too_short
    short = f" ({overlap.too_short} are too short to tell)" if overlap.too_short else ""
    return f"{len(overlap.shared)} of {judged} evaluation documents share 13 words in a row{short}"


def _estimate(estimate: "Estimate") -> dict[str, str]:
    windows, tokens = estimate.batch
    size = estimate.writing_bytes
    writing = f"; while the model writes its text {console.size(size)}" if size else ""
    rows = {
        "model": shapes(estimate.config),
        "parameters": f"{estimate.parameters:,} in {console.size(estimate.stored_bytes)}, "
        f"{estimate.bits_per_weight:.2f} bits per weight",
        "batch": f"{windows} x {tokens} tokens",
        "memory": f"about {console.size(estimate.memory_bytes)}: weights "
        f"{console.size(estimate.weight_bytes)}, activations {console.size(estimate.activation_bytes)}, "
        f"histograms {console.size(estimate.statistics_bytes)}{writing}",
        "time": f"about {duration(estimate.seconds)} {GUESS}",
    }
    if estimate.disk_bytes:
        rows["disk"] = f"{console.size(estimate.disk_bytes)} while the model writes its text"
    return rows


def shapes(config: "MambaConfig") -> str:
    """Sizes of a model in words."""
    return (
        f"{config.n_layer} layers, d_model {config.d_model}, d_inner {config.d_inner}, "
        f"d_state {config.d_state}, vocabulary {config.vocab_size}"
    )


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(42.0), duration(600.0), duration(9000.0)
    ('42 seconds', '10 minutes', '2.5 hours')
    """
    if seconds < 120:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _warnings(report: "CalibrateReport") -> list[str]:
    warnings = []
    if report.coverage is not None and report.coverage.wants_more_samples:
        growing, sites = len(report.coverage.growing), len(report.coverage.sites)
        warnings.append(f"the maximum still grew at {growing} of {sites} sites; take more `--samples`")
    if report.overlap is not None and report.overlap.shared:
        warnings.append(
            f"the calibration text holds passages of {len(report.overlap.shared)} evaluation documents, "
            f"as in `{report.overlap.example}`"
        )
    return warnings


def _as_json(report: "CalibrateReport", *, dry_run: bool) -> dict[str, Any]:
    values: dict[str, Any] = asdict(report) | {"path": str(report.path), "dry_run": dry_run}
    if report.widest_clip is not None:
        values["widest_clip"] = dict(zip(("site", "absmax", "observed"), report.widest_clip, strict=True))
    if report.coverage is not None:
        values["coverage"] |= {
            "growing": [row.site for row in report.coverage.growing],
            "wants_more_samples": report.coverage.wants_more_samples,
        }
    if report.estimate is not None:
        for name in ("memory_bytes", "bits_per_weight"):
            values["estimate"][name] = getattr(report.estimate, name)
    return values
