"""Weight quantizers: W8 with one scale a row, W4 with integer group multipliers under one scale a row.

    W8   w ≈ scale[row] · q                        q in -128 ... 127
    W4   w ≈ scale[row] · (m[row, group] · code)   code in -8 ... 7, m in 1 ... 15

``m · code`` fits int8, so a W4 matrix is an int8 matrix with one scale a row, and its product with int8
activations accumulates exactly in int32 over the whole row.

Results are the same bits for any number of threads and on any device: single elements are computed in
float32, with one rounding an operation and half-to-even rounding to codes; squared errors are exact in
float64 and are added in the fixed order of `_sum_last`.
"""

from dataclasses import dataclass

import torch

from qmamba_cli.errors import CheckpointError, ShapeError
from qmamba_cli.quant.grid import MIN_SCALE, QMAX, QMIN

CODE_MIN, CODE_MAX = -8, 7
MULTIPLIER_MAX = 15
DEFAULT_GROUP_SIZE = 128
# Elements worked on at a time: the search's temporaries take about 24 bytes for each.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowQuantized:
    """A W8 matrix.

    Attributes:
        qweight: (rows, k) int8.
        scale: (rows,) float32, real units a step, > 0.
    """

    qweight: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The real matrix, (rows, k) float32: ``scale · qweight``."""
        return self.qweight.to(torch.float32) * self.scale.unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupQuantized:
    """A W4 matrix in ``g = ceil(k / group_size)`` groups of input channels, the last one possibly shorter.

    Attributes:
        codes: (rows, k) int8 in [-8, 7].
        multiplier: (rows, g) uint8 in [1, 15].
        scale: (rows,) float32, real units a step of ``multiplier · code``, > 0.
        group_size: consecutive input channels that share a multiplier.

    Raises:
        ShapeError: a shape, dtype or range is not as above.
    """

    codes: torch.Tensor
    multiplier: torch.Tensor
    scale: torch.Tensor
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)
        if self.codes.ndim != 2 or self.codes.dtype != torch.int8:
            raise _wrong("codes", self.codes, "torch.int8 (rows, k)")
        rows, k = self.codes.shape
        groups = _group_count(k, self.group_size)
        if self.multiplier.shape != (rows, groups) or self.multiplier.dtype != torch.uint8:
            raise _wrong("multiplier", self.multiplier, f"torch.uint8 ({rows}, {groups})")
        if self.scale.shape != (rows,) or self.scale.dtype != torch.float32:
            raise _wrong("scale", self.scale, f"torch.float32 ({rows},)")
        # Within these ranges every product lies in [-120, 105], inside int8.
        _check_range("codes", self.codes, CODE_MIN, CODE_MAX)
        _check_range("multiplier", self.multiplier, 1, MULTIPLIER_MAX)

    def expand(self) -> torch.Tensor:
        """The int8 matrix it is, (rows, k) int8: ``multiplier · code``, in [-120, 105]."""
        k = self.codes.shape[1]
        wide = self.multiplier.view(torch.int8).repeat_interleave(self.group_size, dim=1)
        return self.codes * wide[:, :k]

    def dequantize(self) -> torch.Tensor:
        """The real matrix, (rows, k) float32: ``scale · (multiplier · code)``."""
        return self.expand().to(torch.float32) * self.scale.unsqueeze(1)


def quantize_rows(weight: torch.Tensor, *, name: str = "weight") -> RowQuantized:
    """W8: ``scale = max(absmax / 127, 1e-8)`` a row, ``q = saturate(round_half_even(w · (1 / scale)))``.

    >>> quantize_rows(torch.tensor([[127.0, -63.5, 0.5], [0.0, 0.0, 0.0]])).qweight.tolist()
    [[127, -64, 0], [0, 0, 0]]

    Args:
        weight: (rows, k) floating, finite; taken as float32.
        name: what the matrix is called in an error.

    Returns:
        The quantized matrix, on weight's device.

    Raises:
        ShapeError: weight is not a floating matrix.
        CheckpointError: weight holds NaN or infinity.
    """
    _check_matrix(weight, name)
    rows, k = weight.shape
    qweight = torch.empty(rows, k, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    for start, stop in _row_chunks(rows, k):
        part = weight[start:stop].detach().to(torch.float32)
        part_scale = _divide(_row_absmax(part, name), QMAX).clamp_min_(MIN_SCALE)
        steps = part * part_scale.reciprocal().unsqueeze(1)
        qweight[start:stop] = steps.round_().clamp_(QMIN, QMAX)
        scale[start:stop] = part_scale
    return RowQuantized(qweight=qweight, scale=scale)


def quantize_groups(
    weight: torch.Tensor, group_size: int = DEFAULT_GROUP_SIZE, *, name: str = "weight"
) -> GroupQuantized:
    """W4: a group's multiplier is the one of 1 ... 15 with the least squared error, the smallest of equals.

        scale = max(absmax of the row / 7 / 15, 1e-8)
        code  = clamp(round_half_even(w · (1 / (scale · m))), -8, 7)
        m     = argmin over 1 ... 15 of  Σ over the group of (w - scale · (m · code))²

    At m = 15 code 7 just holds the row's largest value; a smaller m trades clipping for a finer step.

    >>> matrix = quantize_groups(torch.tensor([[105.0, 30.0, 7.0, 1.0]]), group_size=2)
    >>> matrix.scale.tolist(), matrix.multiplier.tolist(), matrix.codes.tolist()
    ([1.0], [[15, 1]], [[7, 2, 7, 1]])

    Args:
        weight: (rows, k) floating, finite, any k; taken as float32.
        group_size: consecutive input channels that share a multiplier, >= 1.
        name: what the matrix is called in an error.

    Returns:
        The quantized matrix, on weight's device.

    Raises:
        ShapeError: weight is not a floating matrix or group_size is below 1.
        CheckpointError: weight holds NaN or infinity.
    """
    _check_matrix(weight, name)
    _check_group_size(group_size)
    rows, k = weight.shape
    groups = _group_count(k, group_size)
    codes = torch.empty(rows, k, dtype=torch.int8, device=weight.device)
    multiplier = torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    for start, stop in _row_chunks(rows, k):
        part = weight[start:stop].detach().to(torch.float32)
        largest_step = _divide(_row_absmax(part, name), CODE_MAX)
        part_scale = _divide(largest_step, MULTIPLIER_MAX).clamp_min_(MIN_SCALE)
        # Padding of a ragged last group: zeros get code 0 and add no error, whatever the multiplier.
        padded = torch.nn.functional.pad(part, (0, groups * group_size - k))
        grouped = padded.view(stop - start, groups, group_size)
        part_multiplier = _search(grouped, part_scale)
        part_codes = _codes(grouped, part_scale, part_multiplier)
        codes[start:stop] = part_codes.view(stop - start, -1)[:, :k]
        multiplier[start:stop] = part_multiplier
        scale[start:stop] = part_scale
    return GroupQuantized(codes=codes, multiplier=multiplier, scale=scale, group_size=group_size)


def _search(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # (rows, g, group_size) float32 and (rows,) -> (rows, g) float32, the best multipliers.
    shape = grouped.shape[:2]
    best = torch.full(shape, torch.inf, dtype=torch.float64, device=grouped.device)
    chosen = torch.ones(shape, dtype=torch.float32, device=grouped.device)
    for m in range(1, MULTIPLIER_MAX + 1):
        candidate = torch.full_like(chosen, m)
        # The value that `GroupQuantized.dequantize` gives, to the bit.
        real = _codes(grouped, scale, candidate).mul_(m).mul_(scale.view(-1, 1, 1))
        error = _sum_last(real.sub_(grouped).to(torch.float64).square_())
        # Strictly less: of equals the smallest multiplier stays.
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, candidate, chosen)
    return chosen


def _codes(grouped: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    # (rows, g, group_size), (rows,), (rows, g) -> codes as float32 of grouped's shape.
    inv_step = (scale.unsqueeze(1) * multiplier).reciprocal()
    return (grouped * inv_step.unsqueeze(2)).round_().clamp_(CODE_MIN, CODE_MAX)


def _divide(x: torch.Tensor, divisor: int) -> torch.Tensor:
    # By a tensor: torch turns division by a number into a product with its reciprocal on CUDA only.
    return x / torch.full_like(x, divisor)


def _sum_last(terms: torch.Tensor) -> torch.Tensor:
    # Halves are added element by element: an order that no thread count and no vector width changes.
    # Overwrites terms.
    while (width := terms.shape[-1]) > 1:
        half = (width + 1) // 2
        terms[..., : width - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms[..., 0]


def _row_chunks(rows: int, k: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // k)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _group_count(k: int, group_size: int) -> int:
    return -(-k // group_size)


def _row_absmax(part: torch.Tensor, name: str) -> torch.Tensor:
    # amax passes NaN on.
    absmax = part.abs().amax(dim=1)
    if not bool(absmax.isfinite().all()):
        nans, infinities = int(part.isnan().sum()), int(part.isinf().sum())
        raise CheckpointError(
            f"`{name}`: weights are not finite, got {nans} NaN and {infinities} infinite in "
            f"{part.shape[0]} rows, expected none",
            hint="the checkpoint is damaged or was saved after a diverged step; use another one",
        )
    return absmax


def _check_matrix(weight: torch.Tensor, name: str) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise _wrong(name, weight, "a floating matrix (rows, k)")


def _check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise ShapeError(f"wrong group size, got {group_size}, expected at least 1")


def _check_range(name: str, values: torch.Tensor, low: int, high: int) -> None:
    if values.numel():
        smallest, largest = (int(end) for end in values.aminmax())
        if smallest < low or largest > high:
            raise ShapeError(
                f"`{name}`: value out of range, got [{smallest}, {largest}], expected [{low}, {high}]"
            )


def _wrong(name: str, got: torch.Tensor, expected: str) -> ShapeError:
    return ShapeError(
        f"`{name}`: wrong tensor, got {got.dtype} of shape {tuple(got.shape)}, expected {expected}"
    )
