"""The outcome of `calibrate`."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from qmamba_cli import console

if TYPE_CHECKING:
    from qmamba_cli.stages.calibrate import CalibrateReport

# Characters of a digest that people are shown.
DIGEST_SHOWN = 12


def show_calibration(report: "CalibrateReport", *, dry_run: bool, as_json: bool) -> None:
    """The outcome of `calibrate`."""
    clip = report.widest_clip
    if as_json:
        values = asdict(report) | {"path": str(report.path), "dry_run": dry_run}
        if clip is not None:
            values["widest_clip"] = dict(zip(("site", "absmax", "observed"), clip, strict=True))
        console.write_json(values)
        return
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
    if report.skipped_short:
        rows["too short"] = f"{report.skipped_short:,} rows passed over"
    if dry_run:
        del rows["digest"], rows["widest clip"]
    console.facts("calibration" if not dry_run else "calibration (dry run)", rows)
