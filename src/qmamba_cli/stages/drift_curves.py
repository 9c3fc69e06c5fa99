"""The curves of a drift measurement, one after another, as far as they have come when it is interrupted."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qmamba_cli.evaluation.drift import Point, marks, tokens_read
from qmamba_cli.modes import Mode
from qmamba_cli.progress import Advance, Progress
from qmamba_cli.stages.partial import Arrays, Keeper

# Numbers of a point before those of its layers: KL and the ends of its interval, two errors.
_LEADING = 5

# Measures a mode along a path, point after point.
Follow: TypeAlias = Callable[[Mode, str, Advance], Iterator[Point]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One mode's line.

    Attributes:
        mode: name of the row.
        path: prefill or decode.
        points: rising in length.
    """

    mode: str
    path: str
    points: Sequence[Point]


def measured_curves(
    jobs: Sequence[tuple[Mode, str]],
    follow: Follow,
    *,
    length: int,
    layers: int,
    keeper: Keeper | None,
    fingerprint: str,
    progress: Progress,
) -> tuple[list[Curve], bool]:
    """All curves, or those so far and True when it was interrupted; the last of them may be short.

    A curve that was interrupted is measured from its start again by a command that goes on.

    Args:
        jobs: modes and paths.
        follow: measures one of them.
        length: tokens of a stream.
        layers: of the model.
        keeper: where finished curves go when it is interrupted, and come from when it goes on.
        fingerprint: of everything the curves depend on.
        progress: told of the tokens of each curve.

    Raises:
        KeyboardInterrupt: it was interrupted before the first point, or has no keeper.
        ArtifactError: what an interrupted command kept is damaged, or belongs to something else.
    """
    curves: list[Curve] = []
    kept = None if keeper is None else keeper.load(fingerprint)
    if keeper is not None and kept is not None:
        curves = _unpacked(keeper, kept[0], jobs[: kept[1]], length, layers)
    points: list[Point] = []
    try:
        for number, (mode, path) in enumerate(jobs[len(curves) :], len(curves) + 1):
            points = []
            line = f"mode {mode.name}, {path} ({number} of {len(jobs)})"
            with progress(line, tokens_read(length, path)) as advance:
                for point in follow(mode, path, advance):
                    points.append(point)
            curves.append(Curve(mode=mode.name, path=path, points=points))
    except KeyboardInterrupt:
        finished = len(curves)
        if points and not (curves and curves[-1].points is points):
            mode, path = jobs[finished]
            curves.append(Curve(mode=mode.name, path=path, points=points))
        if keeper is None or not curves:
            raise
        keeper.save(fingerprint, {"points": _packed(curves[:finished], length, layers)}, finished)
        return curves, True
    return curves, False


def _packed(curves: Sequence[Curve], length: int, layers: int) -> NDArray[np.float64]:
    """(curves, marks, numbers of a point); an interval that is not there is NaN."""
    rows = np.full((len(curves), len(marks(length)), _LEADING + layers), np.nan)
    for row, curve in zip(rows, curves, strict=True):
        for numbers, point in zip(row, curve.points, strict=True):
            ends = point.kl_ci or (math.nan, math.nan)
            numbers[:] = [point.kl, *ends, point.logits_error, point.state_error, *point.layers]
    return rows


def _unpacked(
    keeper: Keeper, arrays: Arrays, jobs: Sequence[tuple[Mode, str]], length: int, layers: int
) -> list[Curve]:
    """Inverse of `_packed`."""
    rows = arrays.get("points")
    lengths = marks(length)
    if rows is None or rows.shape != (len(jobs), len(lengths), _LEADING + layers):
        raise keeper.damaged("another shape")
    curves = []
    for (mode, path), row in zip(jobs, rows.tolist(), strict=True):
        points = [
            Point(
                t=t,
                kl=kl,
                kl_ci=None if math.isnan(low) else (low, high),
                logits_error=logits_error,
                state_error=state_error,
                layers=of_layers,
            )
            for t, (kl, low, high, logits_error, state_error, *of_layers) in zip(lengths, row, strict=True)
        ]
        curves.append(Curve(mode=mode.name, path=path, points=points))
    return curves
