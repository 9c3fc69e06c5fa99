"""Embedding rows and the inverse rotation in torch: the definition that kernels are judged against."""

import math

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for
from qmamba_cli.kernels.hadamard.reference import hadamard

TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def embedding(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of a table as float32: ``table[id] * scale[id]``.

    >>> table = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    >>> embedding(torch.tensor([1, 0]), table, torch.tensor([0.5, 2.0])).tolist()
    [[6.0, 8.0], [0.5, -1.0]]

    Args:
        ids: (...) int64 in 0 ... V - 1.
        table: (V, d_model) int8 with ``scale``; float32, float16 or bfloat16 without.
        scale: (V,) float32, real units a step of each row, or None.

    Returns:
        (..., d_model) float32.

    Raises:
        ShapeError: a shape or dtype is not as above.
    """
    check_table(ids, table, scale)
    rows = table[ids].to(torch.float32)
    return rows if scale is None else rows.mul_(scale[ids].unsqueeze(-1))


def unrotate(x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    """Inverse of the orthonormal Hadamard transform of the last axis, times a gain.

        y = (x @ H_n / sqrt(n)) * gain        (float32; `hadamard` multiplies by the transpose of H_n)

    H_n is a symmetric Sylvester matrix times a core that need not be symmetric, so the inverse is not
    `hadamard` again.

    >>> unrotate(hadamard(torch.arange(12.0))).round(decimals=4).tolist()[:4]
    [0.0, 1.0, 2.0, 3.0]

    Args:
        x: (..., n) float32.
        gain: (n,) float32, or None for 1.

    Returns:
        (..., n) float32.

    Raises:
        ShapeError: x or gain is not float32 or of another width.
    """
    check_unrotate(x, gain)
    plan = plan_for(x.shape[-1])
    y = x
    if plan.order > 1:
        parts = hadamard(x.reshape(-1, plan.core, plan.order // plan.core))
        if plan.core > 1:
            core = core_matrix(plan.core) / math.sqrt(plan.core)
            parts = torch.matmul(core.T.to(device=x.device, dtype=x.dtype), parts)
        y = parts.reshape(x.shape)
    return y if gain is None else y * gain


def check_table(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None) -> None:
    """What every backend's `embedding` refuses.

    Raises:
        ShapeError: a shape or dtype does not belong to the others.
    """
    if ids.dtype != torch.int64:
        raise ShapeError(f"embedding: `ids` must be int64, got {ids.dtype}")
    if table.dim() != 2:
        raise ShapeError(f"embedding: `table` must be (V, d_model), got {tuple(table.shape)}")
    wanted = (torch.int8,) if scale is not None else TABLE_DTYPES
    if table.dtype not in wanted:
        kind = "with" if scale is not None else "without"
        raise ShapeError(
            f"embedding: `table` is {table.dtype}, expected {' or '.join(map(str, wanted))} {kind} `scale`"
        )
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != table.shape[:1]):
        raise ShapeError(
            f"embedding: `scale` must be float32 ({table.shape[0]},), got {scale.dtype} {tuple(scale.shape)}"
        )


def check_unrotate(x: torch.Tensor, gain: torch.Tensor | None) -> None:
    """What every backend's `unrotate` refuses.

    Raises:
        ShapeError: x or gain is not float32 or of another width.
    """
    if x.dim() == 0 or x.dtype != torch.float32:
        raise ShapeError(f"unrotate: `x` must be float32 (..., n), got {x.dtype} {tuple(x.shape)}")
    if gain is not None and (gain.dtype != torch.float32 or gain.shape != x.shape[-1:]):
        raise ShapeError(
            f"unrotate: `gain` must be float32 ({x.shape[-1]},), got {gain.dtype} {tuple(gain.shape)}"
        )
