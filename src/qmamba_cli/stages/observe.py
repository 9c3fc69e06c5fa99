"""Observing: forward passes over a run of samples, saved from time to time so that they can be continued."""

import glob
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.artifacts.files import reading
from qmamba_cli.artifacts.manifest import CalibrationManifest
from qmamba_cli.artifacts.partial import Progress as Saved
from qmamba_cli.artifacts.partial import read_progress, write_progress
from qmamba_cli.errors import ArtifactError, QmambaError
from qmamba_cli.model.streaming import Observable
from qmamba_cli.progress import Progress
from qmamba_cli.quant.coverage import Coverage
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.stages.common import within_gpu_memory
from qmamba_cli.stages.distributed import Group, World, share_of

# Called after every batch; whether to stop there.
Stop = Callable[[], bool]


class Observed:
    """What passed the sites: the observers' state, and the coverage beside it.

    Attributes:
        observers: histograms and quantiles of every site.
        coverage: maxima of samples and channels.
    """

    def __init__(self, observers: ObserverSet, coverage: Coverage) -> None:
        self.observers = observers
        self.coverage = coverage

    @classmethod
    def empty(cls, plan: CalibrationManifest) -> Self:
        """Nothing observed yet, for the model and the options of ``plan``."""
        n_layer, reduction = _n_layer(plan), Reduction(plan.reduction)
        return cls(ObserverSet(n_layer, alpha=plan.alpha, reduction=reduction), Coverage(n_layer))

    @classmethod
    def from_arrays(
        cls,
        plan: CalibrationManifest,
        statistics: Mapping[str, NDArray[Any]],
        coverage: Mapping[str, NDArray[Any]],
    ) -> Self:
        """What was stored, bit for bit.

        Raises:
            ArtifactError: an array is missing, unknown or malformed.
        """
        n_layer, reduction = _n_layer(plan), Reduction(plan.reduction)
        observers = ObserverSet.from_arrays(statistics, n_layer, alpha=plan.alpha, reduction=reduction)
        return cls(observers, Coverage.from_arrays(coverage, n_layer))

    def observe(self, key: str, x: torch.Tensor) -> None:
        """The model's hook."""
        # First, since it refuses what is not finite.
        self.observers.observe(key, x)
        self.coverage.observe(key, x)

    def merge(self, other: "Observed") -> None:
        """Add what was observed behind this: the same bits as one pass over both."""
        self.observers.merge(other.observers)
        self.coverage.merge(other.coverage)


def _n_layer(plan: CalibrationManifest) -> int:
    return int(plan.model.config["n_layer"] or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A run of samples that one process observes, and where it saves its progress.

    Attributes:
        first: position of the first sample in the choice of samples.
        end: position behind the last one.
        path: the file of its progress.
        save_every: seconds between two saves; 0 saves after every batch.
    """

    first: int
    end: int
    path: Path
    save_every: float


class Run:
    """The observation of one part.

    Args:
        plan: manifest of the artifact to be, without sites.
        part: the samples.
        resume: continue from the part's file if there is one.

    Attributes:
        observed: what was observed so far.
        next: position of the next sample.

    Raises:
        ArtifactError: the file is damaged or belongs to something else.
        QmambaError: the file cannot be read.
    """

    def __init__(self, plan: CalibrationManifest, part: Part, *, resume: bool) -> None:
        self._plan = plan
        self._part = part
        self._saved_at = monotonic()
        self.observed = Observed.empty(plan)
        self.next = part.first
        if resume and part.path.exists():
            saved = read_progress(part.path, plan, first=part.first, end=part.end)
            try:
                self.observed = Observed.from_arrays(plan, saved.statistics, saved.coverage)
            except ArtifactError as error:
                raise ArtifactError(
                    f"`{part.path}` cannot be continued: {error.message}",
                    hint="pass `--force` to start anew",
                ) from None
            self.next = saved.next

    def save(self) -> None:
        """Write the progress, in one step.

        Raises:
            QmambaError: it cannot be written.
        """
        part = self._part
        progress = Saved(
            first=part.first,
            next=self.next,
            end=part.end,
            statistics=self.observed.observers.arrays(),
            coverage=self.observed.coverage.arrays(),
        )
        write_progress(part.path, self._plan, progress)
        self._saved_at = monotonic()

    def advance(
        self, model: Observable, tokens: NDArray[np.int32], *, group: Group, stop: Stop, progress: Progress
    ) -> bool:
        """Forward passes to the end of the part, or until ``stop`` says so.

        Goes by groups of batches, as many as the model takes together: one of a model in memory, more of one
        that is read block by block. Windows are full, so nothing observed is padding.

        Args:
            model: the float model.
            tokens: (samples, seqlen), the whole choice of samples.
            group: the other processes; when one fails this one ends too.
            stop: asked after every batch; within a group of several, what was seen of it is given up.
            progress: told of every batch.

        Returns:
            Whether the end was reached. The progress is on disk in either case.

        Raises:
            QmambaError: the progress cannot be saved, an activation is not finite, or another process failed.
        """
        part, batch_size = self._part, self._plan.dataset.batch_size
        step = model.windows_together(batch_size, self._plan.dataset.seqlen)
        stopped = False
        # The first save shows at once whether the disk takes it.
        self.save()
        try:
            with progress("calibrating", (part.end - self.next) * model.ticks) as advance:

                def tick(units: int) -> bool:
                    nonlocal stopped
                    advance(units)
                    group.check()
                    stopped = stop()
                    return not stopped

                while self.next < part.end:
                    behind = min(self.next + step, part.end)
                    windows = torch.from_numpy(tokens[self.next : behind].astype(np.int64))
                    batches = torch.split(windows, batch_size)
                    with within_gpu_memory(batch_size):
                        if not model.observe(batches, self.observed.observe, tick):
                            # Seen in part, so what is on disk stands.
                            return False
                    self.next = behind
                    # A group of several is saved at once: the next one may be given up halfway.
                    due = step > batch_size or monotonic() - self._saved_at >= part.save_every
                    if stopped or due or behind == part.end:
                        self.save()
                    if stopped:
                        return behind == part.end
        except QmambaError:
            # A failure of the first batch leaves nothing that is worth continuing.
            if self.next == part.first:
                part.path.unlink(missing_ok=True)
            raise
        return True


def together(mine: Observed, plan: CalibrationManifest, group: Group, part: Part) -> Observed | None:
    """What all processes observed, in the order of the samples, where rank 0 runs; None elsewhere.

    The files of their progress are what travels: they carry what they belong to, and their digests.
    """
    if group.world.size == 1:
        return mine
    with reading(part.path):
        data = part.path.read_bytes()
    files = group.gather(data)
    if files is None:
        return None
    bounds = _bounds(plan)
    for rank, content in enumerate(files[1:], start=1):
        first, end = share_of(*bounds, plan.dataset.batch_size, rank, group.world.size)
        with tempfile.TemporaryDirectory(prefix="qmamba-") as folder:
            path = Path(folder, f"rank-{rank}")
            path.write_bytes(content)
            try:
                theirs = read_progress(path, plan, first=first, end=end)
                mine.merge(Observed.from_arrays(plan, theirs.statistics, theirs.coverage))
            except ArtifactError as error:
                raise ArtifactError(
                    f"rank {rank} did not do its part of rank 0's calibration: {error.message}",
                    hint="give every process the same command, checkpoint, text and libraries",
                ) from None
    return mine


def _bounds(plan: CalibrationManifest) -> tuple[int, int]:
    if plan.shard is None:
        return 0, plan.dataset.samples
    return plan.shard.first, plan.shard.first + plan.shard.samples


def progress_path(target: Path, world: World) -> Path:
    """Where one process of ``world`` saves the progress of the artifact ``target``."""
    suffix = "" if world.size == 1 else f"-{world.rank + 1}-of-{world.size}"
    return target.with_name(f"{target.name}.partial{suffix}")


def claimed_path(target: Path, world: World, *, resume: bool, force: bool) -> Path:
    """`progress_path`, with leftovers of an earlier run refused, kept or removed.

    Args:
        target: the artifact.
        world: the processes.
        resume: keep this process's own.
        force: remove them; without effect beside ``resume``.

    Raises:
        QmambaError: there is a leftover, and neither ``resume`` nor ``force`` says what to do with it.
        ArtifactError: the leftover is of another number of processes.
    """
    path = progress_path(target, world)
    others = {progress_path(target, World(rank, world.size)) for rank in range(world.size)} - {path}
    left = sorted(set(target.parent.glob(f"{glob.escape(target.name)}.partial*")) - others)
    if not resume:
        if left and not force:
            raise QmambaError(
                f"`{left[0]}` is the progress of a calibration that was interrupted",
                hint="pass `--resume` to continue it, or `--force` to start anew",
            )
        for entry in left:
            entry.unlink(missing_ok=True)
    elif set(left) - {path}:
        raise ArtifactError(
            f"`{left[-1]}` is of a calibration by another number of processes, expected {world.size}",
            hint="continue with the command that began it, or pass `--force` alone to start anew",
        )
    return path
