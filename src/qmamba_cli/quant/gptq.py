"""W4 by error feedback: what rounding a column loses is made up for in the columns behind it.

The loss is that of the product, ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` with ``H = Xᵀ X`` the second moments of the
matrix's inputs, not that of the weights. The format is the one of `quant.weights`: multipliers and row scales
are chosen for the same loss, and the stored matrix is read by the same kernels at the same speed.

Results are the same bits on one machine with one thread count; they may part in single codes elsewhere.

Source: Frantar et al., "GPTQ" (2023), algorithm 1, in several orders of the columns; the multipliers, the
coordinate sweeps behind it and the refitted row scale are ours.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch

from qmamba_cli.errors import CheckpointError, ShapeError
from qmamba_cli.quant.grid import MIN_SCALE
from qmamba_cli.quant.weights import (
    CODE_MAX,
    CODE_MIN,
    DEFAULT_GROUP_SIZE,
    MULTIPLIER_MAX,
    GroupQuantized,
    quantize_groups,
)

# Added to the diagonal of H, as a share of its mean: inputs that were never seen would make it singular.
DAMPING = 0.01
# How strongly a least-squares fit is drawn to the weight it starts from, as such shares.
_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Row scales that are tried, as shares of the one that holds the row's largest value.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
# Rounds of coordinate descent after the feedback in each order.
_SWEEPS = 2
# Rounds over the groups of the best result.
_ROUNDS = 2
# Columns whose feedback is spread at once.
_BLOCK = 128

# ``Σ x xᵀ`` (k, k) and ``Σ t xᵀ`` (m, k) of inputs x and targets t, float64.
Moments: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def second_moments(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Moments:
    """``Σ x xᵀ`` (k, k) and ``Σ t xᵀ`` (m, k), float64, over pairs of x (..., k) and t (..., m).

    Raises:
        ShapeError: there are no pairs.
    """
    moments = cross = None
    for x, t in pairs:
        inputs = x.reshape(-1, x.shape[-1]).to(torch.float64)
        targets = t.reshape(-1, t.shape[-1]).to(torch.float64)
        own, other = inputs.t() @ inputs, targets.t() @ inputs
        moments = own if moments is None else moments + own
        cross = other if cross is None else cross + other
    if moments is None or cross is None:
        raise ShapeError("second moments: got no inputs, expected at least one batch")
    return moments, cross


def least_squares_weight(weight: torch.Tensor, halves: Sequence[Moments]) -> torch.Tensor:
    """The matrix that turns the inputs x into the targets t best, as far as unseen inputs bear it out.

    The inputs may carry the errors of what was quantized before them; the part of these errors that can be
    told from the inputs is taken back here. How far the matrix may leave ``weight`` is decided by fitting it
    on one half of the inputs and judging it on the other; where every fit loses it stays ``weight``.

    Args:
        weight: (rows, k) floating.
        halves: two of `second_moments`, of different inputs.

    Returns:
        (rows, k) float32.
    """
    real = weight.to(torch.float64)
    first, second = halves
    chosen, least = None, _misfit(real, *first) + _misfit(real, *second)
    for ridge in _RIDGES:
        misfit = _misfit(_corrected(real, *first, ridge), *second)
        misfit += _misfit(_corrected(real, *second, ridge), *first)
        if misfit < least:
            chosen, least = ridge, misfit
    if chosen is None:
        return real.to(torch.float32)
    both = (first[0] + second[0], first[1] + second[1])
    return _corrected(real, *both, chosen).to(torch.float32)


def _corrected(
    weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor, ridge: float
) -> torch.Tensor:
    """The ridge regression of the targets on the inputs, drawn to ``weight``; float64."""
    correction: torch.Tensor = torch.linalg.solve(_damped(moments, ridge), (cross - weight @ moments).t())
    return weight + correction.t()


def _misfit(weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor) -> float:
    """``Σ |W x - t|²`` less the constant ``Σ |t|²``."""
    return float(((weight @ moments) * weight).sum() - 2 * (weight * cross).sum())


def quantize_groups_gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    group_size: int = DEFAULT_GROUP_SIZE,
    *,
    name: str = "weight",
) -> GroupQuantized:
    """W4 with the least error of the product that feedback finds.

    Never worse than `quantize_groups`: where its result has the smaller loss in a row, that row is taken.

    Args:
        weight: (rows, k) floating, finite; taken as float32.
        moments: (k, k) float64 or float32, ``Σ x xᵀ`` over the inputs, on weight's device.
        group_size: consecutive input channels that share a multiplier, >= 1.
        name: what the matrix is called in an error.

    Returns:
        The quantized matrix, on weight's device.

    Raises:
        ShapeError: weight or moments is no matrix of these sizes.
        CheckpointError: weight or moments hold NaN or infinity.
    """
    plain = quantize_groups(weight, group_size, name=name)
    k = weight.shape[1]
    if moments.shape != (k, k) or not moments.is_floating_point():
        raise ShapeError(
            f"`{name}`: wrong second moments, got {moments.dtype} of shape {tuple(moments.shape)}, "
            f"expected floating ({k}, {k})"
        )
    if not bool(moments.isfinite().all()):
        raise CheckpointError(
            f"`{name}`: second moments are not finite, got NaN or infinity, expected numbers",
            hint="the float model breaks down on the calibration text; check the checkpoint's weights",
        )
    target = weight.detach().to(torch.float32).to(torch.float64)
    hessian = _damped(moments.to(torch.float64))
    scale = _row_scales(target, _importance(hessian), group_size)
    best = None
    for order in _orders(hessian.diagonal()):
        found = _fed(target, hessian, order, scale, group_size).descended(target, hessian, _SWEEPS)
        best = found if best is None else best.or_better(found, target, hessian)
    assert best is not None, "there are orders"
    for _ in range(_ROUNDS):
        best = best.regrouped(target, hessian).descended(target, hessian, 1)
    fed = best.descended(target, hessian, 1).stored()
    ours, theirs = (_losses(target - row.dequantize().to(torch.float64), hessian) for row in (fed, plain))
    worse = ours > theirs
    return GroupQuantized(
        codes=torch.where(worse.unsqueeze(1), plain.codes, fed.codes),
        multiplier=torch.where(worse.unsqueeze(1), plain.multiplier, fed.multiplier),
        scale=torch.where(worse, plain.scale, fed.scale),
        group_size=group_size,
    )


class _Candidate(NamedTuple):
    """A matrix on the grid while it is sought; float64.

    Attributes:
        codes: (rows, k).
        multiplier: (rows, g).
        scale: (rows,), float32 values.
        group_size: columns of a group.
    """

    codes: torch.Tensor
    multiplier: torch.Tensor
    scale: torch.Tensor
    group_size: int

    @property
    def integers(self) -> torch.Tensor:
        """Multiplier times code, (rows, k)."""
        return self.codes * self._wide

    @property
    def _wide(self) -> torch.Tensor:
        k = self.codes.shape[1]
        return self.multiplier.repeat_interleave(self.group_size, dim=1)[:, :k]

    def losses(self, target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """Loss of each row, (rows,)."""
        return _losses(target - self.integers * self.scale.unsqueeze(1), hessian)

    def descended(self, target: torch.Tensor, hessian: torch.Tensor, sweeps: int) -> "_Candidate":
        """After rounds of coordinate descent, each with the row scales that fit its codes best."""
        found = self
        for _ in range(sweeps):
            codes = _swept(target, hessian, found.codes, found.scale.unsqueeze(1) * found._wide)
            found = found._replace(codes=codes)
            found = found._replace(scale=_refitted(target, hessian, found.integers, found.scale))
        return found

    def or_better(self, other: "_Candidate", target: torch.Tensor, hessian: torch.Tensor) -> "_Candidate":
        """Row by row the one with the smaller loss, this one of equals."""
        better = other.losses(target, hessian) < self.losses(target, hessian)
        return _Candidate(
            codes=torch.where(better.unsqueeze(1), other.codes, self.codes),
            multiplier=torch.where(better.unsqueeze(1), other.multiplier, self.multiplier),
            scale=torch.where(better, other.scale, self.scale),
            group_size=self.group_size,
        )

    def regrouped(self, target: torch.Tensor, hessian: torch.Tensor) -> "_Candidate":
        """Group after group with the neighbouring multipliers tried, the rest of the row as it is."""
        codes, multiplier, k = self.codes.clone(), self.multiplier.clone(), self.codes.shape[1]
        for group, first in enumerate(range(0, k, self.group_size)):
            part = slice(first, min(first + self.group_size, k))
            left = target - _Candidate(codes, multiplier, self.scale, self.group_size).integers * (
                self.scale.unsqueeze(1)
            )
            left[:, part] = 0
            own = hessian[part, part]
            # What the group should be to make up for the others.
            wanted = target[:, part] + torch.linalg.solve(own, (left @ hessian[:, part]).t()).t()
            factor = _factor(own)
            tried = [(multiplier[:, group], codes[:, part])]
            for change in (-1, 0, 1):
                candidate = (self.multiplier[:, group] + change).clamp(1, MULTIPLIER_MAX)
                step = (self.scale * candidate).unsqueeze(1).expand_as(wanted)
                tried.append((candidate, _rounded(wanted, factor, step)))
            losses = torch.stack(
                [_losses(wanted - some * (self.scale * m).unsqueeze(1), own) for m, some in tried]
            )
            for row, (m, some) in enumerate(tried[1:], start=1):
                chosen = losses.argmin(dim=0) == row
                multiplier[:, group] = torch.where(chosen, m, multiplier[:, group])
                codes[:, part] = torch.where(chosen.unsqueeze(1), some, codes[:, part])
        return self._replace(codes=codes, multiplier=multiplier)

    def stored(self) -> GroupQuantized:
        """In the dtypes of the format."""
        return GroupQuantized(
            codes=self.codes.to(torch.int8),
            multiplier=self.multiplier.to(torch.uint8),
            scale=self.scale.to(torch.float32),
            group_size=self.group_size,
        )


def _orders(diagonal: torch.Tensor) -> Sequence[torch.Tensor]:
    """Orders in which columns are rounded: as they lie, backwards, and by their inputs' power either way."""
    falling = torch.argsort(diagonal, descending=True, stable=True)
    plain = torch.arange(diagonal.shape[0], device=diagonal.device)
    return plain, plain.flip(0), falling, falling.flip(0)


def _factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H, (k, k) float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _importance(hessian: torch.Tensor) -> torch.Tensor:
    """What an error in each column costs when those behind it make up for it, (k,) float64."""
    return _factor(hessian).diagonal().square().reciprocal()


def _damped(moments: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    mean = float(moments.diagonal().mean())
    # Where nothing was seen every direction counts the same, and the feedback is nought.
    damping = share * mean if mean > 0 else 1.0
    return moments + damping * torch.eye(moments.shape[0], dtype=torch.float64, device=moments.device)


def _row_scales(target: torch.Tensor, importance: torch.Tensor, group_size: int) -> torch.Tensor:
    """The best of the shrunken row scales, (rows,) float64 with float32 values."""
    holding = (target.abs().amax(dim=1) / (CODE_MAX * MULTIPLIER_MAX)).clamp_min(MIN_SCALE)
    chosen, least = holding, torch.full_like(holding, torch.inf)
    for share in _SHRINK:
        scale = (holding * share).clamp_min(MIN_SCALE)
        loss = torch.zeros_like(scale)
        for first in range(0, target.shape[1], group_size):
            part = slice(first, first + group_size)
            loss += _best_multipliers(target[:, part], scale, importance[part])[1]
        chosen = torch.where(loss < least, scale, chosen)
        least = torch.minimum(loss, least)
    return _as_float32(chosen)


def _best_multipliers(
    part: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiplier of one group of each row and its weighted squared error, (rows,) float64 both."""
    chosen, least = torch.ones_like(scale), torch.full_like(scale, torch.inf)
    for m in range(1, MULTIPLIER_MAX + 1):
        step = (scale * m).unsqueeze(1)
        real = (part / step).round_().clamp_(CODE_MIN, CODE_MAX).mul_(step)
        loss = real.sub_(part).square_() @ importance
        # Strictly less: of equals the smallest multiplier stays.
        chosen = torch.where(loss < least, torch.full_like(chosen, m), chosen)
        least = torch.minimum(loss, least)
    return chosen, least


def _fed(
    target: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, scale: torch.Tensor, group_size: int
) -> _Candidate:
    """Rounded in one order of the columns, with the multipliers that suit it."""
    factor = _factor(hessian[order][:, order])
    importance = torch.empty_like(factor.diagonal())
    importance[order] = factor.diagonal().square().reciprocal()
    starts = range(0, target.shape[1], group_size)
    parts = (slice(first, first + group_size) for first in starts)
    multiplier = torch.stack(
        [_best_multipliers(target[:, part], scale, importance[part])[0] for part in parts], dim=1
    )
    found = _Candidate(torch.empty_like(target), multiplier, scale, group_size)
    step = scale.unsqueeze(1) * found._wide
    found.codes[:, order] = _rounded(target[:, order], factor, step[:, order])
    return found


def _rounded(wanted: torch.Tensor, factor: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Codes of each column in turn, its error made up for in those behind it; (rows, k) float64."""
    rows, k = wanted.shape
    rest, codes = wanted.clone(), torch.empty_like(wanted)
    for first in range(0, k, _BLOCK):
        last = min(first + _BLOCK, k)
        errors = torch.empty(rows, last - first, dtype=wanted.dtype, device=wanted.device)
        for j in range(first, last):
            codes[:, j] = (rest[:, j] / step[:, j]).round_().clamp_(CODE_MIN, CODE_MAX)
            error = (rest[:, j] - codes[:, j] * step[:, j]) / factor[j, j]
            rest[:, j + 1 : last] -= error.unsqueeze(1) * factor[j, j + 1 : last]
            errors[:, j - first] = error
        rest[:, last:] -= errors @ factor[first:last, last:]
    return codes


def _swept(
    target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """The codes after one round over the columns, each given its best while the others stay."""
    codes = codes.clone()
    gradient = (target - codes * step) @ hessian
    diagonal = hessian.diagonal()
    for first in range(0, target.shape[1], _BLOCK):
        last = min(first + _BLOCK, target.shape[1])
        moved = torch.empty(target.shape[0], last - first, dtype=target.dtype, device=target.device)
        for j in range(first, last):
            wanted = codes[:, j] + gradient[:, j] / diagonal[j] / step[:, j]
            wanted.round_().clamp_(CODE_MIN, CODE_MAX)
            moved[:, j - first] = (wanted - codes[:, j]) * step[:, j]
            codes[:, j] = wanted
            gradient[:, j:last] -= moved[:, j - first].unsqueeze(1) * hessian[j, j:last]
        gradient[:, last:] -= moved @ hessian[first:last, last:]
    return codes


def _refitted(
    target: torch.Tensor, hessian: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The row scales that fit the integers best, in closed form; the old one where there is none."""
    weighed = integers @ hessian
    above, below = (weighed * target).sum(dim=1), (weighed * integers).sum(dim=1)
    fitted = above / below.clamp_min(torch.finfo(below.dtype).tiny)
    return _as_float32(torch.where((below > 0) & (fitted > MIN_SCALE), fitted, scale))


def _losses(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Loss of each row, (rows,) float64."""
    return ((difference @ hessian) * difference).sum(dim=1)


def _as_float32(scale: torch.Tensor) -> torch.Tensor:
    # What is stored is float32, so the codes are chosen for that number.
    return scale.to(torch.float32).to(torch.float64)
