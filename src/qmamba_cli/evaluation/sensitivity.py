"""What each quantized tensor costs: its own error, and what that error does to the model's predictions.

The own error of a tensor is its signal-to-noise ratio and the share of its values that the grid clips. The
cost is the KL divergence to the float model and the change of the log-likelihood when this tensor is
quantized and everything else is float, or the other way round. Only costs can be compared between tensors: a
coarse grid on a tensor that the model does not rely on is cheap.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qmamba_cli.evaluation.divergence import Outcome, intervals
from qmamba_cli.quant.grid import QMAX, QMIN, Scale, along_channels, dequantize, reciprocal
from qmamba_cli.quant.histogram import Histogram

# The grid of `quant.histogram`.
_BINS_PER_OCTAVE = 512
_FIRST_OCTAVE = -32


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A tensor that is quantized on its own.

    Attributes:
        site: an observed site, or the name of a weight as in ``in_proj.weight``.
        layer: 0-based index, or None for all layers at once (or for the one tensor of the whole model).
        part: one of the tensors that share the site's scale, as in ``z`` of ``in_proj:output``; None for all.
    """

    site: str
    layer: int | None = None
    part: str | None = None

    @property
    def label(self) -> str:
        """For people: ``x_proj:input``, ``in_proj:output[z]`` or ``layer 3, x_proj:input``."""
        name = self.site if self.part is None else f"{self.site}[{self.part}]"
        return name if self.layer is None else f"layer {self.layer}, {name}"


@dataclass(slots=True)
class TensorError:
    """What a grid does to the values of one tensor, added up over everything that passed.

    Attributes:
        signal: Σ x².
        noise: Σ (x - x̂)².
        clipped: values beyond the ends of the grid.
        count: values.
    """

    signal: float = 0.0
    noise: float = 0.0
    clipped: int = 0
    count: int = 0

    def update(self, x: torch.Tensor, scale: Scale) -> None:
        """Add a float tensor that is put on the int8 grid of ``scale``; both are as for `quantize`."""
        steps = x.to(torch.float32) * (
            along_channels(scale, x).reciprocal() if isinstance(scale, torch.Tensor) else reciprocal(scale)
        )
        codes = steps.round()
        clipped = (codes > QMAX) | (codes < QMIN)
        real = dequantize(codes.clamp_(QMIN, QMAX).to(torch.int8), scale)
        self.add(x, real, int(clipped.sum()))

    def add(self, x: torch.Tensor, quantized: torch.Tensor, clipped: int) -> None:
        """Add a float tensor and what became of it."""
        self.signal += float(x.square().sum(dtype=torch.float64))
        self.noise += float((x - quantized).square().sum(dtype=torch.float64))
        self.clipped += clipped
        self.count += x.numel()

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise) in decibels; None where nothing was seen or nothing was lost."""
        if self.count == 0 or self.noise == 0 or self.signal == 0:
            return None
        return 10 * math.log10(self.signal / self.noise)

    @property
    def clip_rate(self) -> float | None:
        """Share of the values beyond the ends of the grid; None where nothing was seen."""
        return self.clipped / self.count if self.count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tensor's line.

    Attributes:
        target: which tensor.
        kl: mean KL divergence to the float model, nats a token, with this tensor alone quantized, or, in
            the leave-one-out view, with everything quantized but this one.
        kl_ci: its 95 % interval, or None with a single document.
        delta_ll: change of the mean log-likelihood, nats a token.
        share: of the view's total: the KL over the sum of all rows, or, where one thing differs from
            everything quantized, the part of its KL that goes away.
        sqnr_db: the tensor's own signal-to-noise ratio; the mean of the layers' where the row is all of them.
        clip_rate: share of its values beyond the ends of the grid.
        gain: KL of everything quantized less this row's, nats a token; None where it is not held against it.
        gain_ci: its 95 % interval, paired: both KL from the same resampled documents.
    """

    target: Target
    kl: float
    kl_ci: tuple[float, float] | None
    delta_ll: float
    share: float
    sqnr_db: float | None
    clip_rate: float | None
    gain: float | None = None
    gain_ci: tuple[float, float] | None = None

    @property
    def cost(self) -> float:
        """The KL divergence for ranking; a model that broke down (NaN) costs more than any other."""
        return math.inf if math.isnan(self.kl) else self.kl

    def record(self) -> dict[str, Any]:
        """The row as one JSON object."""
        part = {} if self.target.part is None else {"part": self.target.part}
        gain: dict[str, Any] = {}
        if self.gain is not None:
            gain = {"gain": self.gain, "gain_ci": None if self.gain_ci is None else list(self.gain_ci)}
        return {
            "site": self.target.site,
            **part,
            "layer": self.target.layer,
            "kl": self.kl,
            "kl_ci": None if self.kl_ci is None else list(self.kl_ci),
            "delta_ll": self.delta_ll,
            "share": self.share,
            "sqnr_db": self.sqnr_db,
            "clip_rate": self.clip_rate,
            **gain,
        }


def alone(outcomes: Mapping[Target, Outcome], errors: Mapping[Target, TensorError], layers: int) -> list[Row]:
    """Rows of tensors quantized one at a time, the most expensive first.

    Args:
        outcomes: one a target.
        errors: own errors of the single tensors: every (site, part) of every layer.
        layers: number of layers, to find the errors of rows that are all of them.
    """
    total = sum(outcome.kl_mean for outcome in outcomes.values())
    rows = [
        _row(target, outcome, kl_ci, _share(outcome.kl_mean, total), errors, layers)
        for (target, outcome), kl_ci in zip(outcomes.items(), _intervals(outcomes), strict=True)
    ]
    return sorted(rows, key=lambda row: row.cost, reverse=True)


def against_everything(
    outcomes: Mapping[Target, Outcome],
    everything: Outcome,
    errors: Mapping[Target, TensorError],
    layers: int,
) -> list[Row]:
    """Rows of models with everything quantized but one difference, the one that helps most first.

    Args:
        outcomes: one a target, which is left float or gets a finer grid.
        everything: without a difference, over the same documents.
        errors: as for `alone`.
        layers: as for `alone`.
    """
    total = everything.kl_mean
    gains = intervals([everything.kl - outcome.kl for outcome in outcomes.values()], everything.tokens)
    rows = [
        replace(
            _row(target, outcome, kl_ci, _share(total - outcome.kl_mean, total), errors, layers),
            gain=total - outcome.kl_mean,
            gain_ci=gain_ci,
        )
        for (target, outcome), kl_ci, gain_ci in zip(
            outcomes.items(), _intervals(outcomes), gains, strict=True
        )
    ]
    return sorted(rows, key=lambda row: row.cost)


def _intervals(outcomes: Mapping[Target, Outcome]) -> list[tuple[float, float] | None]:
    """The interval of each mean KL; the outcomes are over the same documents."""
    if not outcomes:
        return []
    tokens = next(iter(outcomes.values())).tokens
    return intervals([outcome.kl for outcome in outcomes.values()], tokens)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 and math.isfinite(whole) else 0.0


def _row(
    target: Target,
    outcome: Outcome,
    kl_ci: tuple[float, float] | None,
    share: float,
    errors: Mapping[Target, TensorError],
    layers: int,
) -> Row:
    sqnr_db, clip_rate = tensor_error(target, errors, layers)
    return Row(
        target=target,
        kl=outcome.kl_mean,
        kl_ci=kl_ci,
        delta_ll=outcome.delta_ll_mean,
        share=share,
        sqnr_db=sqnr_db,
        clip_rate=clip_rate,
    )


def tensor_error(
    target: Target, errors: Mapping[Target, TensorError], layers: int
) -> tuple[float | None, float | None]:
    """SQNR in decibels and clip rate of a target.

    For all layers at once: the mean of the layers' decibels, which no layer of large values dominates, and
    the clip rate over all values.
    """
    if target in errors:
        return errors[target].sqnr_db, errors[target].clip_rate
    candidates = (Target(site=target.site, layer=layer, part=target.part) for layer in range(layers))
    found = [errors[candidate] for candidate in candidates if candidate in errors]
    decibels = [error.sqnr_db for error in found if error.sqnr_db is not None]
    count = sum(error.count for error in found)
    return (
        math.fsum(decibels) / len(decibels) if decibels else None,
        sum(error.clipped for error in found) / count if count else None,
    )


def linear_histogram(histogram: Histogram, bars: int) -> tuple[list[float], list[int]]:
    """A histogram of |x| on equal steps from 0 to its maximum.

    A logarithmic bin is at most 2^-9 of its value wide, far narrower than a bar, and goes whole to the bar
    that holds its middle.

    Returns:
        ``bars + 1`` edges in real units, and ``bars`` counts.
    """
    first, counts = histogram.span()
    top = histogram.absmax or 1.0
    bins = first + np.arange(len(counts))
    octave, step = np.divmod(bins - 1, _BINS_PER_OCTAVE)
    middles = np.ldexp(1 + (step + 0.5) / _BINS_PER_OCTAVE, octave + _FIRST_OCTAVE)
    middles = np.minimum(np.where(bins == 0, 0.0, middles), top)
    edges = np.linspace(0.0, top, bars + 1)
    heights, _ = np.histogram(middles, bins=edges, weights=counts.astype(np.float64))
    return edges.tolist(), heights.astype(np.int64).tolist()


def csv_lines(rows: Iterable[Row], *, view: str) -> list[str]:
    """Rows as CSV, one line each without a heading: `CSV_COLUMNS`, empty where there is no value."""
    return [",".join(_csv_cell(cell) for cell in _csv_cells(row, view)) for row in rows]


CSV_COLUMNS: Sequence[str] = (
    "view",
    "site",
    "part",
    "layer",
    "kl",
    "kl_low",
    "kl_high",
    "delta_ll",
    "share",
    "sqnr_db",
    "clip_rate",
    "gain",
    "gain_low",
    "gain_high",
)


def _csv_cells(row: Row, view: str) -> Sequence[str | float | int | None]:
    low, high = row.kl_ci or (None, None)
    gain_low, gain_high = row.gain_ci or (None, None)
    target = row.target
    return (
        view,
        target.site,
        target.part,
        target.layer,
        row.kl,
        low,
        high,
        row.delta_ll,
        row.share,
        row.sqnr_db,
        row.clip_rate,
        row.gain,
        gain_low,
        gain_high,
    )


def _csv_cell(value: str | float | int | None) -> str:
    return "" if value is None else str(value)
