"""The outcome of `verify`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.errors import ArtifactError

if TYPE_CHECKING:
    from qmamba_cli.stages.verify import Check

# The order of the chain, from what everything comes from to what is concluded.
_STAGES = ("source", "calibration", "export", "results")


def show_checks(path: Path, checks: "Sequence[Check]", *, as_json: bool) -> None:
    """The outcome of `verify`.

    Raises:
        ArtifactError: a check failed.
    """
    failed = [check for check in checks if check.verdict.value == "failed"]
    parts = [check for stage in _STAGES for check in checks if check.stage == stage]
    if as_json:
        rows = [{"what": row.what, "verdict": row.verdict.value, "detail": row.detail} for row in checks]
        lineage = [
            {"stage": row.stage, "what": row.what, "verdict": row.verdict.value, "digest": row.digest or None}
            for row in parts
        ]
        console.write_json({"path": str(path), "ok": not failed, "checks": rows, "lineage": lineage})
    else:
        columns = (Column("check"), Column("verdict"), Column("detail"))
        console.table(
            f"verify {path}", columns, [(row.what, row.verdict.value, row.detail) for row in checks]
        )
        chain = " -> ".join(f"{row.stage} {row.digest[:12] or '?'}" for row in parts)
        console.write(f"lineage: {chain}\n")
    if failed:
        raise ArtifactError(
            f"{failed[0].what} failed: {failed[0].detail}",
            hint="copy the artifact again, or make it again with `qmamba calibrate` and `qmamba export`",
        )
