"""The operators as torch custom ops, so that torch.compile, torch.export and FakeTensor see through a model.

`as_custom_ops` gives a backend whose operators go through torch's dispatcher as ``torch.ops.qmamba.NAME``,
each with a fake implementation that knows the result's shape, dtype and strides. The backends themselves are
called directly: the dispatcher costs microseconds a call.

Source: PyTorch, "Custom Python Operators" (torch.library.custom_op).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qmamba_cli.kernels._flat import OPERATORS
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.linear.interleaved import Interleaved, Weight
from qmamba_cli.kernels.selective_scan.reference import ScanResult
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import Scale

NAMESPACE = "qmamba"


def as_custom_ops(backend: Backend) -> Backend:
    """The backend with every operator behind torch's dispatcher; the numbers are the same."""
    _register()
    ops = torch.ops.qmamba
    return replace(
        backend,
        quantize=lambda x, scale: ops.quantize(x, *_number_or_channels(scale)),
        dequantize=lambda q, scale: ops.dequantize(q, *_number_or_channels(scale)),
        quantize_per_token=ops.quantize_per_token,
        rms_norm=lambda x, weight, *, eps, out_scale=None, out_dtype=None: ops.rms_norm(
            x, weight, eps, out_scale, out_dtype
        ),
        linear=_linear,
        linear_split=_linear_split,
        embedding=lambda ids, table, scale=None: ops.embedding(ids, table, scale),
        unrotate=lambda x, gain=None: ops.unrotate(x, gain),
        causal_conv1d=_causal_conv1d,
        causal_conv1d_both=_causal_conv1d_both,
        selective_scan=_selective_scan,
        hadamard=lambda x, *, out_scale=None: ops.hadamard(x, out_scale),
    )


def _flat(weight: Weight) -> tuple[Tensor, Tensor | None, int, int]:
    if isinstance(weight, Interleaved):
        weight = weight.expand() if weight.device.type == "cpu" else _expand(weight)
    if isinstance(weight, Tensor):
        return weight, None, 0, weight.shape[1]
    return weight.codes, weight.multiplier, weight.group_size, weight.columns


def _number_or_channels(scale: Scale | None) -> tuple[float | None, Tensor | None]:
    return (None, scale) if isinstance(scale, Tensor) else (scale, None)


def _expand(weight: Interleaved) -> Tensor:
    from qmamba_cli.kernels.linear.operands import expand

    return expand(weight)


@cache
def _register() -> None:
    """Register every operator, once and at first use: importing a module must not change torch."""
    for name, (implementation, fake) in OPERATORS.items():
        define: Callable[..., Any] = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())
        define(implementation).register_fake(fake)


def _linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    x_scale: float | None = None,
    weight_scale: Tensor | None = None,
    out_scale: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    out: Tensor = torch.ops.qmamba.linear(x, *_flat(weight), bias, x_scale, weight_scale, out_scale, residual)
    return out


def _linear_split(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    split: int,
    x_scale: float,
    weight_scale: Tensor,
    out_scale: float,
) -> tuple[Tensor, Tensor]:
    first, rest = torch.ops.qmamba.linear_split(
        x, *_flat(weight), bias, split, x_scale, weight_scale, out_scale
    )
    return first, rest


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    x_scale: float | Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_scale: Scale | None = None,
    state: ConvState | None = None,
) -> tuple[Tensor, ConvState]:
    token_scale = x_scale if isinstance(x_scale, Tensor) else None
    number = None if isinstance(x_scale, Tensor) else x_scale
    values, scales = (None, None) if state is None else state
    out, kept, kept_scale = torch.ops.qmamba.causal_conv1d(
        *(x, weight, bias, number, token_scale, weight_scale, *_number_or_channels(out_scale), values, scales)
    )
    return out, ConvState(kept, None if token_scale is None else kept_scale)


def _causal_conv1d_both(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, out_scale: Scale, **options: Any
) -> tuple[Tensor, Tensor, ConvState]:
    v, state = _causal_conv1d(x, weight, bias, **options)
    return v, torch.ops.qmamba.quantize(v, *_number_or_channels(out_scale)), state


def _selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    *,
    order: ScanOrder,
    u_scale: Scale | None = None,
    requantize_u: bool = False,
    dt_scale: float | None = None,
    b_scale: float | None = None,
    c_scale: float | None = None,
    z_scale: float | None = None,
    state: Tensor | None = None,
    state_scale: float | None = None,
    return_chunk_states: bool = False,
) -> ScanResult:
    y, new, chunks = torch.ops.qmamba.selective_scan(
        *(u, dt, A, B, C, D, z, dt_bias, str(order), *_number_or_channels(u_scale)),
        *(requantize_u, dt_scale, b_scale, c_scale, z_scale, state, state_scale, return_chunk_states),
    )
    return ScanResult(y, new, chunks if return_chunk_states else None)
