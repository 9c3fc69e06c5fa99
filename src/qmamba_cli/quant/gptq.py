"""W4 by error feedback: what rounding a column loses is made up for in the columns behind it.

The loss is that of the product, ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` with ``H = Xᵀ X`` the second moments of the
matrix's inputs, not that of the weights. The format is the one of `quant.weights`: multipliers and row scales
are chosen for the same loss, and the stored matrix is read by the same kernels at the same speed.

Results are the same bits on one machine with one thread count; they may part in single codes elsewhere.

Source: Frantar et al., "GPTQ" (2023), algorithm 1; the multipliers, the coordinate sweeps behind it and the
refitted row scale are ours.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

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
# Rounds of coordinate descent after the feedback.
_SWEEPS = 2
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
    hessian, factor = _factored(moments.to(torch.float64))
    scale = _row_scales(target, factor, group_size)
    codes, multiplier = _feedback(target, factor, scale, group_size)
    wide = multiplier.repeat_interleave(group_size, dim=1)[:, :k]
    for _ in range(_SWEEPS):
        _sweep(target, hessian, codes, scale.unsqueeze(1) * wide)
        scale = _refitted(target, hessian, codes * wide, scale)
    fed = GroupQuantized(
        codes=codes.to(torch.int8),
        multiplier=multiplier.to(torch.uint8),
        scale=scale.to(torch.float32),
        group_size=group_size,
    )
    worse = _loss(target, hessian, fed) > _loss(target, hessian, plain)
    return GroupQuantized(
        codes=torch.where(worse.unsqueeze(1), plain.codes, fed.codes),
        multiplier=torch.where(worse.unsqueeze(1), plain.multiplier, fed.multiplier),
        scale=torch.where(worse, plain.scale, fed.scale),
        group_size=group_size,
    )


def _factored(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped H, and the upper Cholesky factor of its inverse; both (k, k) float64."""
    hessian = _damped(moments)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return hessian, torch.linalg.cholesky(inverse, upper=True)


def _damped(moments: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    mean = float(moments.diagonal().mean())
    # Where nothing was seen every direction counts the same, and the feedback is nought.
    damping = share * mean if mean > 0 else 1.0
    return moments + damping * torch.eye(moments.shape[0], dtype=torch.float64, device=moments.device)


def _row_scales(target: torch.Tensor, factor: torch.Tensor, group_size: int) -> torch.Tensor:
    """The best of the shrunken row scales, (rows,) float64 with float32 values."""
    importance = factor.diagonal().square().reciprocal()
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


def _feedback(
    target: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, k) and multipliers (rows, g), float64; a group chooses when the feedback reaches it."""
    rows, k = target.shape
    importance = factor.diagonal().square().reciprocal()
    rest, codes, multipliers = target.clone(), torch.empty_like(target), []
    for group in range(0, k, group_size):
        end = min(group + group_size, k)
        multiplier = _best_multipliers(rest[:, group:end], scale, importance[group:end])[0]
        multipliers.append(multiplier)
        step = scale * multiplier
        for first in range(group, end, _BLOCK):
            last = min(first + _BLOCK, end)
            errors = torch.empty(rows, last - first, dtype=target.dtype, device=target.device)
            for j in range(first, last):
                codes[:, j] = (rest[:, j] / step).round_().clamp_(CODE_MIN, CODE_MAX)
                error = (rest[:, j] - codes[:, j] * step) / factor[j, j]
                rest[:, j + 1 : last] -= error.unsqueeze(1) * factor[j, j + 1 : last]
                errors[:, j - first] = error
            rest[:, last:] -= errors @ factor[first:last, last:]
    return codes, torch.stack(multipliers, dim=1)


def _sweep(target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, step: torch.Tensor) -> None:
    """One round over the columns, each given its best codes while the others stay; changes ``codes``."""
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


def _refitted(
    target: torch.Tensor, hessian: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The row scales that fit the integers best, in closed form; the old one where there is none."""
    weighed = integers @ hessian
    above, below = (weighed * target).sum(dim=1), (weighed * integers).sum(dim=1)
    fitted = above / below.clamp_min(torch.finfo(below.dtype).tiny)
    return _as_float32(torch.where((below > 0) & (fitted > MIN_SCALE), fitted, scale))


def _loss(target: torch.Tensor, hessian: torch.Tensor, matrix: GroupQuantized) -> torch.Tensor:
    """Loss of each row, (rows,) float64."""
    difference = target - matrix.dequantize().to(torch.float64)
    return ((difference @ hessian) * difference).sum(dim=1)


def _as_float32(scale: torch.Tensor) -> torch.Tensor:
    # What is stored is float32, so the codes are chosen for that number.
    return scale.to(torch.float32).to(torch.float64)
