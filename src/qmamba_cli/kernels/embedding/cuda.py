"""Embedding rows and the inverse rotation on CUDA; `reference` is the definition."""

import math
from functools import cache

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import contiguous, launch, require_cuda, round_up
from qmamba_cli.kernels.embedding import reference
from qmamba_cli.kernels.embedding.reference import check_table, check_unrotate
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for

SOURCE = "embedding/embedding.cu"
_TYPES = {
    torch.int8: "signed char",
    torch.float32: "float",
    torch.float16: "Half",
    torch.bfloat16: "Brain",
}
ENTRIES = (*(f"embedding<{name}>" for name in _TYPES.values()), "unrotate")

_WARP = 32
_WORD = 32
_MAX_THREADS = 1024
# What every GPU from compute capability 8.0 on lends to one block.
_MAX_SHARED_BYTES = 99 * 1024
# Shorter blocks of a transform would leave most of a block of threads idle.
_LEAST_ORDER = 64


def embedding(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.embedding` on CUDA tensors, the same bits; an id outside the table gives a row of NaN.

    Raises:
        ShapeError: a shape or dtype is not as the reference's, or a tensor is on another device.
    """
    check_table(ids, table, scale)
    table, ids = contiguous("table", table), contiguous("ids", ids)
    if ids.device != table.device:
        raise ShapeError(f"embedding: `ids` is on {ids.device}, expected {table.device} as `table`")
    rows, width = table.shape
    out = torch.empty(*ids.shape, width, dtype=torch.float32, device=table.device)
    if out.numel():
        launch(
            SOURCE,
            f"embedding<{_TYPES[table.dtype]}>",
            grid=(ids.numel(), 1, 1),
            block=(_threads(width), 1, 1),
            args=(
                ids,
                table,
                None if scale is None else contiguous("scale", scale),
                out,
                np.int32(rows),
                np.int32(width),
            ),
            device=table.device,
        )
    return out


def unrotate(x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.unrotate` on CUDA tensors, of class real; orders that do not fit run the reference there.

    Raises:
        ShapeError: a shape or dtype is not as the reference's, or x is not on a GPU.
    """
    check_unrotate(x, gain)
    plan = plan_for(x.shape[-1])
    shared_bytes = 4 * (plan.order + plan.core * -(-plan.core // _WORD))
    if plan.order < _LEAST_ORDER or shared_bytes > _MAX_SHARED_BYTES:
        return reference.unrotate(require_cuda("x", x), gain)
    x = contiguous("x", x)
    out = torch.empty_like(x)
    if x.numel():
        launch(
            SOURCE,
            "unrotate",
            grid=(x.numel() // plan.order, 1, 1),
            block=(_threads(plan.order // 2), 1, 1),
            args=(
                x,
                None if gain is None else contiguous("gain", gain),
                _core(plan.core, x.device),
                out,
                np.int32(plan.core),
                np.int32((plan.order // plan.core).bit_length() - 1),
                np.int32(plan.width // plan.order),
                np.float32(1.0 / math.sqrt(plan.order)),
            ),
            device=x.device,
            shared_bytes=shared_bytes,
        )
    return out


def _threads(elements: int) -> int:
    return min(round_up(max(elements, 1), _WARP), _MAX_THREADS)


@cache
def _core(order: int, device: torch.device) -> torch.Tensor:
    """(order, words) int32: which entries of each column of the core are negative."""
    negative = core_matrix(order).t() < 0
    words = -(-order // _WORD)
    bits = torch.zeros(order, words * _WORD, dtype=torch.int64)
    bits[:, :order] = negative
    value = (bits.view(order, words, _WORD) << torch.arange(_WORD)).sum(dim=-1)
    # A word's highest bit is its sign.
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32).to(device)
