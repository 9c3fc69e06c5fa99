"""Random blocks whose activations fill their grids, for tests and benchmarks; made on the device."""

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.decode.tensors import BlockTensors, DecodeColumns, DecodeScales, DecodeState
from qmamba_cli.quant.weights import GroupQuantized, RowQuantized

_STATES = 16
T = TypeVar("T", BlockTensors, DecodeScales, DecodeState)
# Standard deviation of uniform int8 codes, and of code times multiplier.
_STEPS_W8 = 73.6
_STEPS_W4 = 42.0

SCALES = DecodeScales(
    in_proj_input=4.03 / 127,
    in_proj_output=5.02 / 127,
    x_proj_input=2.51 / 127,
    x_proj_output=4.04 / 127,
    dt_proj_output=4.01 / 127,
    ssm_state=0.41 / 127,
    out_proj_input=2.03 / 127,
)


def random_block(
    *,
    d_model: int,
    d_inner: int,
    dt_rank: int,
    w_bits: int,
    seed: int,
    d_conv: int = 4,
    group_size: int = 128,
    bias: bool = True,
    device: torch.device | str = "cpu",
) -> BlockTensors:
    """Random weights; with `SCALES` all activations stay within or near their grids.

    Args:
        d_model: width of the residual.
        d_inner: channels.
        dt_rank: columns of dt_proj.
        w_bits: 4 or 8, of in_proj and out_proj.
        seed: same seed, same block on one kind of device.
        d_conv: taps.
        group_size: of W4 matrices.
        bias: whether the convolution and the projections have one.
        device: where to make it.
    """
    rng = torch.Generator(device=device).manual_seed(seed)

    def codes(*shape: int, low: int = -127, high: int = 127) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=rng, device=device, dtype=torch.int8)

    def spread(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=rng, device=device) + 0.5

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    def rows(m: int, k: int, gain: float) -> RowQuantized:
        return RowQuantized(qweight=codes(m, k), scale=spread(m) * (gain / math.sqrt(k) / _STEPS_W8))

    def matrix(m: int, k: int, gain: float) -> RowQuantized | GroupQuantized:
        if w_bits == 8:
            return rows(m, k, gain)
        groups = -(-k // group_size)
        return GroupQuantized(
            codes=codes(m, k, low=-8, high=7),
            multiplier=torch.randint(1, 16, (m, groups), generator=rng, device=device, dtype=torch.uint8),
            scale=spread(m) * (gain / math.sqrt(k) / _STEPS_W4),
            group_size=group_size,
        )

    steps = torch.arange(1, _STATES + 1, device=device, dtype=torch.float32)
    return BlockTensors(
        in_proj=matrix(2 * d_inner, d_model, 1.0),
        conv=rows(d_inner, d_conv, 1.0),
        x_proj=rows(dt_rank + 2 * _STATES, d_inner, 2.0),
        dt_proj=rows(d_inner, dt_rank, 1.0),
        out_proj=matrix(d_model, d_inner, 0.5),
        dt_bias=normal(d_inner) - 3.0,
        A=-spread(d_inner, _STATES) * steps,
        D=spread(d_inner),
        in_bias=normal(2 * d_inner) * 0.05 if bias else None,
        conv_bias=normal(d_inner) * 0.2 if bias else None,
        out_bias=normal(d_model) * 0.05 if bias else None,
    )


def with_channel_scales(scales: DecodeScales, d_inner: int, *, seed: int) -> DecodeScales:
    """The same with a scale for every channel of u, a half to one and a half of its own."""
    rng = torch.Generator().manual_seed(seed)
    return replace(scales, x_proj_input=(torch.rand(d_inner, generator=rng) + 0.5) * scales.x_proj_input)


def with_channel_columns(x_proj: RowQuantized) -> RowQuantized:
    """x_proj as it is stored beside such scales, for activations of the same size."""
    return replace(x_proj, scale=x_proj.scale * SCALES.x_proj_input)


def random_state(
    *,
    batch: int,
    d_inner: int,
    columns: DecodeColumns,
    seed: int,
    d_conv: int = 4,
    device: torch.device | str = "cpu",
) -> DecodeState:
    """A state as after some tokens."""
    rng = torch.Generator(device=device).manual_seed(seed)
    values = torch.randint(
        -127, 128, (batch, d_inner, d_conv - 1), generator=rng, device=device, dtype=torch.int8
    )
    scale = None
    if columns.dynamic_input:
        scale = (torch.rand(batch, d_conv - 1, generator=rng, device=device) + 0.5) * 0.03
    if columns.int8_state:
        ssm = torch.randint(
            -127, 128, (batch, d_inner, _STATES), generator=rng, device=device, dtype=torch.int8
        )
    else:
        ssm = torch.randn(batch, d_inner, _STATES, generator=rng, device=device) * 0.1
    return DecodeState(ConvState(values, scale), ssm)


def to_device(value: T, device: torch.device | str) -> T:
    """A copy of a block, scales or a state with every tensor on ``device``."""
    moved: T = _moved(value, device)
    return moved


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple):
        return type(value)(*(_moved(item, device) for item in value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value
