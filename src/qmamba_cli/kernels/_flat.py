"""The operators with tensors and numbers only, and what is known of a result without computing it.

Everything here follows the signatures of the references beside the kernels. Results of shape (b, d, l) lie
channel by channel, and a tensor that is absent from a result is empty.
"""

import torch
from torch import Tensor

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.backend import CPU, Backend, select_backend
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.kernels.selective_scan.reference import CHUNK
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import Scale


def _table(tensor: Tensor) -> Backend:
    return CPU if tensor.device.type == "cpu" else select_backend("cuda")


def _channels_last(x: Tensor) -> Tensor:
    """(b, d, l) in memory of (b, l, d), copied only if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_channels_last(like: Tensor, dtype: torch.dtype) -> Tensor:
    b, d, length = like.shape
    return like.new_empty(b, length, d, dtype=dtype).transpose(1, 2)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else x


def _float_of(x: Tensor) -> torch.dtype:
    """Dtype of a float result: that of x, or float32 for integers."""
    return x.dtype if x.dtype.is_floating_point else torch.float32


def _weight(weight: Tensor, multiplier: Tensor | None, group_size: int, columns: int) -> Tensor | PackedInt4:
    if multiplier is None:
        return weight
    return PackedInt4(codes=weight, multiplier=multiplier, group_size=group_size, columns=columns)


def _scale(number: float | None, of_channels: Tensor | None) -> Scale | None:
    return number if of_channels is None else of_channels


def _given(number: float | None, of_channels: Tensor | None) -> Scale:
    scale = _scale(number, of_channels)
    if scale is None:
        raise ShapeError("a grid needs a scale, got neither a number nor one a channel")
    return scale


def _quantize(x: Tensor, scale: float | None, channel_scale: Tensor | None) -> Tensor:
    return _table(x).quantize(x, _given(scale, channel_scale)).contiguous()


def _quantize_fake(x: Tensor, scale: float | None, channel_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape, dtype=torch.int8)


def _dequantize(q: Tensor, scale: float | None, channel_scale: Tensor | None) -> Tensor:
    return _table(q).dequantize(q, _given(scale, channel_scale)).contiguous()


def _dequantize_fake(q: Tensor, scale: float | None, channel_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.shape, dtype=torch.float32)


def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = _table(x).quantize_per_token(x)
    return _channels_last(q), scale.contiguous()


def _quantize_per_token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        _empty_channels_last(x, torch.int8),
        x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32),
    )


def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, out_scale: float | None, out_dtype: torch.dtype | None
) -> Tensor:
    return _table(x).rms_norm(x, weight, eps=eps, out_scale=out_scale, out_dtype=out_dtype).contiguous()


def _rms_norm_fake(
    x: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    out_scale: float | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8 if out_scale is not None else out_dtype or x.dtype)


def _hadamard(x: Tensor, out_scale: float | None) -> Tensor:
    return _table(x).hadamard(x, out_scale=out_scale).contiguous()


def _hadamard_fake(x: Tensor, out_scale: float | None) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if out_scale is None else torch.int8)


def _embedding(ids: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    return _table(table).embedding(ids, table, scale).contiguous()


def _embedding_fake(ids: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:  # noqa: ARG001
    return table.new_empty(*ids.shape, table.shape[1], dtype=torch.float32)


def _unrotate(x: Tensor, gain: Tensor | None) -> Tensor:
    return _table(x).unrotate(x, gain).contiguous()


def _unrotate_fake(x: Tensor, gain: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _linear_flat(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,
    group_size: int,
    columns: int,
    bias: Tensor | None,
    x_scale: float | None,
    weight_scale: Tensor | None,
    out_scale: float | None,
    residual: Tensor | None,
) -> Tensor:
    return (
        _table(x)
        .linear(
            x,
            _weight(weight, multiplier, group_size, columns),
            bias,
            x_scale=x_scale,
            weight_scale=weight_scale,
            out_scale=out_scale,
            residual=residual,
        )
        .contiguous()
    )


def _linear_flat_fake(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,  # noqa: ARG001
    group_size: int,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    x_scale: float | None,  # noqa: ARG001
    weight_scale: Tensor | None,  # noqa: ARG001
    out_scale: float | None,
    residual: Tensor | None,
) -> Tensor:
    dtype = torch.float32 if residual is not None else _float_of(x)
    dtype = dtype if out_scale is None else torch.int8
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


def _linear_split_flat(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,
    group_size: int,
    columns: int,
    bias: Tensor | None,
    split: int,
    x_scale: float,
    weight_scale: Tensor,
    out_scale: float,
) -> tuple[Tensor, Tensor]:
    first, rest = _table(x).linear_split(
        x,
        _weight(weight, multiplier, group_size, columns),
        bias,
        split=split,
        x_scale=x_scale,
        weight_scale=weight_scale,
        out_scale=out_scale,
    )
    return first.contiguous(), rest.contiguous()


def _linear_split_flat_fake(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,  # noqa: ARG001
    group_size: int,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    split: int,
    x_scale: float,  # noqa: ARG001
    weight_scale: Tensor,  # noqa: ARG001
    out_scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return (
        x.new_empty(*lead, split, dtype=torch.float32),
        x.new_empty(*lead, weight.shape[0] - split, dtype=torch.int8),
    )


def _conv_flat(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: float | None,
    token_scale: Tensor | None,
    weight_scale: Tensor | None,
    out_scale: float | None,
    out_channel_scale: Tensor | None,
    state: Tensor | None,
    state_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, new = _table(x).causal_conv1d(
        x,
        weight,
        bias,
        x_scale=x_scale if token_scale is None else token_scale,
        weight_scale=weight_scale,
        out_scale=_scale(out_scale, out_channel_scale),
        state=None if state is None else ConvState(state, state_scale),
    )
    scale = None if new.scale is None else new.scale.contiguous()
    return _channels_last(out), new.values.contiguous(), _or_empty(scale, x)


def _conv_flat_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    x_scale: float | None,  # noqa: ARG001
    token_scale: Tensor | None,
    weight_scale: Tensor | None,  # noqa: ARG001
    out_scale: float | None,
    out_channel_scale: Tensor | None,
    state: Tensor | None,  # noqa: ARG001
    state_scale: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    b, d, _ = x.shape
    kept = weight.shape[1] - 1
    coarse = _scale(out_scale, out_channel_scale)
    scale = None if token_scale is None else x.new_empty(b, kept, dtype=torch.float32)
    return (
        _empty_channels_last(x, _float_of(x) if coarse is None else torch.int8),
        x.new_empty(b, d, kept),
        _or_empty(scale, x),
    )


def _scan_flat(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    order: str,
    u_scale: float | None,
    u_channel_scale: Tensor | None,
    requantize_u: bool,
    dt_scale: float | None,
    b_scale: float | None,
    c_scale: float | None,
    z_scale: float | None,
    state: Tensor | None,
    state_scale: float | None,
    return_chunk_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    result = _table(u).selective_scan(
        u,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        order=ScanOrder(order),
        u_scale=_scale(u_scale, u_channel_scale),
        requantize_u=requantize_u,
        dt_scale=dt_scale,
        b_scale=b_scale,
        c_scale=c_scale,
        z_scale=z_scale,
        state=state,
        state_scale=state_scale,
        return_chunk_states=return_chunk_states,
    )
    chunks = None if result.chunk_states is None else result.chunk_states.contiguous()
    return result.y.contiguous(), result.state.contiguous(), _or_empty(chunks, u)


def _scan_flat_fake(
    u: Tensor,
    dt: Tensor,  # noqa: ARG001
    A: Tensor,
    B: Tensor,  # noqa: ARG001
    C: Tensor,  # noqa: ARG001
    D: Tensor,  # noqa: ARG001
    z: Tensor,  # noqa: ARG001
    dt_bias: Tensor,  # noqa: ARG001
    order: str,  # noqa: ARG001
    u_scale: float | None,  # noqa: ARG001
    u_channel_scale: Tensor | None,  # noqa: ARG001
    requantize_u: bool,  # noqa: ARG001
    dt_scale: float | None,  # noqa: ARG001
    b_scale: float | None,  # noqa: ARG001
    c_scale: float | None,  # noqa: ARG001
    z_scale: float | None,  # noqa: ARG001
    state: Tensor | None,  # noqa: ARG001
    state_scale: float | None,
    return_chunk_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, d, length = u.shape
    n = A.shape[1]
    chunks = u.new_empty(b, -(-length // CHUNK), d, n, dtype=torch.float32) if return_chunk_states else None
    return (
        u.new_empty(b, length, d, dtype=_float_of(u)),
        u.new_empty(b, d, n, dtype=torch.float32 if state_scale is None else torch.int8),
        _or_empty(chunks, u),
    )


# Operator → implementation and fake.
OPERATORS = {
    "quantize": (_quantize, _quantize_fake),
    "dequantize": (_dequantize, _dequantize_fake),
    "quantize_per_token": (_quantize_per_token, _quantize_per_token_fake),
    "rms_norm": (_rms_norm, _rms_norm_fake),
    "hadamard": (_hadamard, _hadamard_fake),
    "embedding": (_embedding, _embedding_fake),
    "unrotate": (_unrotate, _unrotate_fake),
    "linear": (_linear_flat, _linear_flat_fake),
    "linear_split": (_linear_split_flat, _linear_split_flat_fake),
    "causal_conv1d": (_conv_flat, _conv_flat_fake),
    "selective_scan": (_scan_flat, _scan_flat_fake),
}
