"""The place of the largest value in torch: the definition that kernels are judged against."""

import torch

from qmamba_cli.errors import ShapeError


def argmax(x: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row, of equal ones the first; NaN is larger than any number.

    >>> argmax(torch.tensor([[1.0, 3.0, 3.0], [-2.0, -4.0, -3.0]])).tolist()
    [1, 0]

    Args:
        x: (..., n) float32, n at least 1, rows of any stride.

    Returns:
        (...) int64.

    Raises:
        ShapeError: x is not as above.
    """
    check(x)
    return x.argmax(dim=-1)


def check(x: torch.Tensor) -> None:
    """Check the operand of `argmax`.

    Raises:
        ShapeError: it is not as there.
    """
    if x.dim() == 0 or x.dtype != torch.float32 or x.shape[-1] == 0:
        raise ShapeError(
            f"argmax: `x` must be float32 with a last axis that is not empty, got {x.dtype} {tuple(x.shape)}"
        )
