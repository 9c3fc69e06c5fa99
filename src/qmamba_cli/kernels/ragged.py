"""Sequences of different lengths one behind another in one row, so that no operator works on padding.

Everything but the convolution and the scan treats tokens one by one and needs to know nothing of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.selective_scan.reference import ScanResult

# Operands of the scan that have time as their last dimension; the others belong to channels.
_TIMED = (0, 1, 3, 4, 6)


def ragged(ops: Backend, lengths: Sequence[int]) -> Backend:
    """The backend for one row of ``sum(lengths)`` tokens that holds a sequence for each length.

    A convolution and a scan start anew with each sequence, from its own row of the state: their tensors have
    b = 1, their states one row a sequence.

    Args:
        ops: the backend whose operators are called, a sequence at a time.
        lengths: tokens of each sequence, each at least 1.

    Raises:
        ShapeError: a length is less than 1.
    """
    if not lengths or min(lengths) < 1:
        raise ShapeError(f"lengths must be at least 1, got {list(lengths)}")
    sizes = list(lengths)

    def conv(
        op: Callable[..., Any],
        x: torch.Tensor,
        *args: Any,
        x_scale: Any = None,
        state: ConvState | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        per_token = isinstance(x_scale, torch.Tensor)
        scales = x_scale.split_with_sizes(sizes, dim=1) if per_token else [x_scale] * len(sizes)
        done = [
            op(part, *args, x_scale=scale, state=_row(state, row), **options)
            for row, (part, scale) in enumerate(zip(x.split_with_sizes(sizes, dim=2), scales, strict=True))
        ]
        # Channels stay adjacent, as the kernels write and read them.
        *outs, after = zip(*done, strict=True)
        whole = [torch.cat([y.transpose(1, 2) for y in out], dim=1).transpose(1, 2) for out in outs]
        scale = torch.cat([each.scale for each in after]) if per_token else None
        return *whole, ConvState(torch.cat([each.values for each in after]), scale)

    def scan(*operands: torch.Tensor, state: torch.Tensor | None = None, **options: Any) -> ScanResult:
        parts = [
            operand.split_with_sizes(sizes, dim=2) if index in _TIMED else [operand] * len(sizes)
            for index, operand in enumerate(operands)
        ]
        done = [
            ops.selective_scan(*own, state=None if state is None else state[row : row + 1], **options)
            for row, own in enumerate(zip(*parts, strict=True))
        ]
        chunk_states = [each.chunk_states for each in done if each.chunk_states is not None]
        return ScanResult(
            torch.cat([each.y for each in done], dim=1),
            torch.cat([each.state for each in done]),
            torch.cat(chunk_states, dim=1) if chunk_states else None,
        )

    return replace(
        ops,
        causal_conv1d=partial(conv, ops.causal_conv1d),
        causal_conv1d_both=partial(conv, ops.causal_conv1d_both),
        selective_scan=scan,
    )


def _row(state: ConvState | None, row: int) -> ConvState | None:
    if state is None:
        return None
    return ConvState(state.values[row : row + 1], None if state.scale is None else state.scale[row : row + 1])
