"""Shards of a calibration to the whole: the bytes of a calibration that was made in one go."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmamba_cli.artifacts.calibration import ENTRIES, read_calibration, read_calibration_manifest
from qmamba_cli.artifacts.files import check_output
from qmamba_cli.artifacts.manifest import CalibrationManifest, ShardRecord
from qmamba_cli.artifacts.partial import plan_differences
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.progress import Progress, silent
from qmamba_cli.stages.calibrate import CalibrateReport, write_artifact
from qmamba_cli.stages.observe import Observed


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What `merge` is asked; the defaults are the command line's.

    Attributes:
        shards: the folders, in any order.
        workdir: the work folder, which records the result.
        out: the folder to write, or None for the work folder's ``calibration/``.
        force: replace an existing calibration.
    """

    shards: tuple[Path, ...]
    workdir: Path = Path("qmamba-artifacts")
    out: Path | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    manifest: CalibrationManifest
    record: ShardRecord

    @property
    def end(self) -> int:
        return self.record.first + self.record.samples


def merge(options: MergeOptions, *, progress: Progress = silent) -> CalibrateReport:
    """Put shards together, in the order of their samples, and write the whole calibration.

    Reads the shards; writes one calibration as a whole or not at all, and records it in the work folder. It
    equals, byte for byte, the calibration without shards, for every reduction. One shard is held in memory
    beside the sum.

    Raises:
        UsageError: no shard is named.
        ArtifactError: a shard is damaged or is none, two belong to different calibrations or hold the same
            samples, or samples are missing.
        QmambaError: the result cannot be written.
    """
    if not options.shards:
        raise UsageError("no shard to merge, got none, expected folders", hint="`qmamba merge DIR…`")
    workdir = Workdir(options.workdir)
    target = options.out or workdir.calibration_path
    check_output(target, force=options.force, directory=True, known=ENTRIES)
    shards = _complete([_opened(path) for path in options.shards])
    plan = shards[0].manifest.model_copy(update={"shard": None, "sites": {}, "tensors": {}})
    whole = Observed.empty(plan)
    with progress("merging shards", len(shards)) as advance:
        for shard in shards:
            artifact = read_calibration(shard.path, shards=True)
            if artifact.manifest != shard.manifest:
                raise ArtifactError(f"shard `{shard.path}` was replaced while it was read")
            try:
                observed = Observed.from_arrays(plan, artifact.statistics, artifact.coverage)
            except ArtifactError as error:
                raise ArtifactError(f"shard `{shard.path}`: {error.message}", hint=_again(shard)) from None
            whole.merge(observed)
            advance(1)
    report = CalibrateReport(
        path=target,
        digest="",
        sites=len(whole.observers),
        samples=plan.dataset.samples,
        tokens=plan.dataset.tokens,
        skipped_short=0,
        widest_clip=None,
        device=plan.device,
    )
    return write_artifact(workdir, plan, whole, report, force=options.force)


def _opened(path: Path) -> _Shard:
    manifest = read_calibration_manifest(path)
    if manifest.shard is None:
        raise ArtifactError(
            f"`{path}` is a whole calibration, expected a shard",
            hint="shards are made by `qmamba calibrate MODEL --shard K/N`",
        )
    return _Shard(path, manifest, manifest.shard)


def _complete(shards: Sequence[_Shard]) -> list[_Shard]:
    """The shards in the order of their samples, which must be all samples of one calibration, each once."""
    ordered = sorted(shards, key=lambda shard: (shard.record.first, str(shard.path)))
    first = ordered[0]
    for shard in ordered[1:]:
        for difference in plan_differences(shard.manifest, first.manifest):
            raise ArtifactError(
                f"shard `{shard.path}` is of another calibration than `{first.path}`: {difference}",
                hint="make every shard with the same command but for `--shard`, on equal installations",
            )
    end, before = 0, None
    for shard in ordered:
        if shard.record.first < end and before is not None:
            raise ArtifactError(
                f"shards `{before.path}` and `{shard.path}` overlap, got {_name(before)} and {_name(shard)}, "
                f"both with sample {shard.record.first}",
                hint="name every shard once, all of one split",
            )
        _require_no_gap(end, shard.record.first, first)
        end, before = shard.end, shard
    _require_no_gap(end, first.manifest.dataset.samples, first)
    return ordered


def _require_no_gap(end: int, following: int, any_shard: _Shard) -> None:
    if end < following:
        raise ArtifactError(
            f"samples {end} to {following - 1} of {any_shard.manifest.dataset.samples} are missing, expected "
            "a shard that holds them",
            hint=f"name all {any_shard.record.count} shards; one is made by `qmamba calibrate MODEL --shard "
            f"K/{any_shard.record.count}`",
        )


def _name(shard: _Shard) -> str:
    return f"{shard.record.number}/{shard.record.count}"


def _again(shard: _Shard) -> str:
    return f"make it again: `qmamba calibrate MODEL --shard {_name(shard)} --force`"
