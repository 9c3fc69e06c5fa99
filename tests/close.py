"""Comparisons for the three exactness classes of docs/numerics.md; a failure names index, values, budget."""

import math
import warnings

import torch

# Shares of the budget above which a passing comparison still warns.
TIGHT = 0.8


def assert_exact(op: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Class exact: the same dtype, shape and bits."""
    _same_form(op, got, expected, dtype=True)
    if not torch.equal(got, expected):
        wrong = torch.nonzero(got != expected)
        where = tuple(wrong[0].tolist()) if len(wrong) else "a NaN"
        raise AssertionError(
            f"{op}: {len(wrong)} of {got.numel()} elements differ, expected none; first at {where}: "
            f"got {got[where] if len(wrong) else got}, expected {expected[where] if len(wrong) else expected}"
        )


def assert_grid(op: str, got: torch.Tensor, expected: torch.Tensor, *, share: float, steps: int = 1) -> None:
    """Class grid: int8 values at most ``steps`` off, and off in at most ``share`` of the elements."""
    _same_form(op, got, expected, dtype=True)
    assert got.dtype == torch.int8, f"{op}: got {got.dtype}, expected int8"
    off = (got.to(torch.int32) - expected.to(torch.int32)).abs()
    where = _index(off.argmax(), off.shape)
    worst, moved = int(off.max()), int((off > 0).sum())
    assert worst <= steps, (
        f"{op}: {worst} steps off at {where}, expected at most {steps}; "
        f"got {got[where].item()}, expected {expected[where].item()}"
    )
    # One element may always sit on a tie, however small the tensor.
    allowed = max(1, math.floor(share * got.numel()))
    assert moved <= allowed, f"{op}: {moved} of {got.numel()} elements are off, expected at most {allowed}"


def assert_close(op: str, got: torch.Tensor, expected: torch.Tensor, budget: torch.Tensor | float) -> float:
    """Class real: ``|got - expected| <= budget`` element by element; NaN and infinity never pass.

    Args:
        op: what is compared, for messages.
        got: any shape, floating.
        expected: of got's shape, usually float64.
        budget: absolute tolerance, one number or one an element.

    Returns:
        The largest share of the budget that was used.
    """
    _same_form(op, got, expected, dtype=False)
    wanted = expected.to(torch.float64)
    error = (got.to(torch.float64) - wanted).abs()
    limit = torch.as_tensor(budget, dtype=torch.float64).expand_as(error)
    assert bool((limit >= 0).all()), f"{op}: a negative budget"
    used = torch.where(error == 0, 0.0, error / limit).nan_to_num(nan=math.inf, posinf=math.inf)
    where = _index(used.argmax(), used.shape)
    share = float(used[where])
    line = (
        f"{op}: worst at {where}: got {got[where].item():.9g}, expected {wanted[where].item():.9g}, "
        f"abs error {error[where].item():.3g}, "
        f"rel error {error[where].item() / max(abs(wanted[where].item()), 1e-300):.3g}, "
        f"{100 * share:.0f}% of budget {limit[where].item():.3g}"
    )
    assert share <= 1, f"{line}; {int((used > 1).sum())} of {used.numel()} elements over budget"
    if share > TIGHT:
        warnings.warn(line, stacklevel=2)
    return share


def _same_form(op: str, got: torch.Tensor, expected: torch.Tensor, *, dtype: bool) -> None:
    assert got.shape == expected.shape, f"{op}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.numel() > 0, f"{op}: nothing to compare"
    if dtype:
        assert got.dtype == expected.dtype, f"{op}: {got.dtype}, expected {expected.dtype}"


def _index(flat: torch.Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(axis) for axis in torch.unravel_index(flat, shape))
