"""Selective scan in torch: the definition that kernels are judged against."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import Scale, dequantize, fake_quantize, quantize

# Steps of one chunk of the chunked order; the sequential order takes as many at a time to bound memory.
# Calibration observes the state at the ends of these chunks.
CHUNK = 64
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of one step of the recurrence. Torch hands larger operations to its thread pool, which costs more
# than a step's arithmetic, and very much more where the cores are busy; this size also stays in the cache.
_STEP_ELEMENTS = 32767


class ScanResult(NamedTuple):
    """What a scan returns.

    Attributes:
        y: (b, l, d) gated output in the dtype of u, float32 where u is int8; channels last, as the Hadamard
            transform and out_proj read it.
        state: (b, d, n) state after the last token, int8 or float32.
        chunk_states: (b, ceil(l / CHUNK), d, n) float32 states at chunk ends and after the last token, or
            None.
    """

    y: torch.Tensor
    state: torch.Tensor
    chunk_states: torch.Tensor | None


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    order: ScanOrder,
    u_scale: Scale | None = None,
    requantize_u: bool = False,
    dt_scale: float | None = None,
    b_scale: float | None = None,
    c_scale: float | None = None,
    z_scale: float | None = None,
    state: torch.Tensor | None = None,
    state_scale: float | None = None,
    return_chunk_states: bool = False,
) -> ScanResult:
    """Selective state-space recurrence, softplus, skip and gate included; float32 inside.

        delta_t = softplus(dt_t + dt_bias)                        (threshold 20)
        h_t     = exp(delta_t * A) * h_{t-1} + (delta_t * u_t) * B_t
        y_t     = sum_n C_t[n] * h_t[n] + D * u_t
        out_t   = y_t * (z_t * sigmoid(z_t))

    Sequential order runs t from left to right. Chunked order cuts t into chunks of ``CHUNK``: every chunk is
    run from a zero state to get its end S and its decay P = exp(A * sum(delta)); the carries H = P * H + S
    are chained; every chunk is run again from its true start. The two differ by float32 summation order only.

    y is always computed from the unrounded new state; only the state that leaves the call is quantized.

    >>> one = torch.ones(1, 1, 3)
    >>> result = selective_scan(
    ...     one, one * 0.5413, -torch.ones(1, 1), one, one, torch.zeros(1), one * 20, torch.zeros(1),
    ...     order=ScanOrder.SEQUENTIAL)
    >>> [round(value / 20, 4) for value in result.y.flatten().tolist()]
    [1.0, 1.3679, 1.5032]

    Args:
        u: (b, d, l) int8 with ``u_scale``, or float: float32, float16 or bfloat16. Any strides, as for every
            argument.
        dt: (b, d, l) before its bias, int8 with ``dt_scale``, or float.
        A: (d, n) float32, negative: ``-exp(A_log)``.
        B: (b, n, l) int8 with ``b_scale``, or float.
        C: (b, n, l) int8 with ``c_scale``, or float.
        D: (d,) float32.
        z: (b, d, l) int8 with ``z_scale``, or float.
        dt_bias: (d,) float32.
        order: chunked or sequential.
        u_scale: real units a step of an int8 u, or of the grid that a float u is requantized to: one number,
            or (d,) float32 with one a channel.
        requantize_u: put a float u on the int8 grid first; needs ``u_scale``.
        dt_scale: real units a step of dt.
        b_scale: real units a step of B.
        c_scale: real units a step of C.
        z_scale: real units a step of z.
        state: (b, d, n) from the call before: int8 with ``state_scale``, or float32; None for zeros.
        state_scale: real units a step of an int8 state, in and out; None keeps it float32.
        return_chunk_states: also return the states at chunk ends.

    Returns:
        y, the new state and, if asked, the states at chunk ends.

    Raises:
        ShapeError: a shape or dtype is not as above.

    Source: Gu and Dao, "Mamba" (2023), algorithm 2; state-spaces/mamba ``selective_scan_ref``. The chunked
        order and the grids are ours, see docs/numerics.md.
    """
    b, d, l = check_operands(u, dt, A, B, C, z, state, state_scale)
    scales = {"u": u_scale, "dt": dt_scale, "B": b_scale, "C": c_scale, "z": z_scale}
    check_scales({"u": u, "dt": dt, "B": B, "C": C, "z": z}, scales, requantize_u)
    u_real = _real(u, u_scale, requantize_u)
    delta = torch.nn.functional.softplus(_time_major(_real(dt, dt_scale)) + dt_bias)  # (l, b, d)
    u_time = _time_major(u_real)
    driven = delta * u_time
    B_time, C_time = _time_major(_real(B, b_scale)), _time_major(_real(C, c_scale))  # (l, b, n)
    h = _initial_state(state, state_scale, b, d, A)  # (n, b, d)

    y = torch.empty(l, b, d, dtype=torch.float32, device=u.device)
    run = _run_chunked if order is ScanOrder.CHUNKED else _run_sequential
    ends = torch.empty(-(-l // CHUNK), *h.shape, device=u.device) if return_chunk_states else None
    for channels in _channel_blocks(h.shape):
        A_t = A[channels].t().unsqueeze(1)  # (n, 1, channels)
        for index, (start, stop) in enumerate(_pieces(l)):
            delta_piece = delta[start:stop, :, channels]
            decay = torch.exp(delta_piece.unsqueeze(1) * A_t)  # (t, n, b, channels)
            B_piece, C_piece = B_time[start:stop].transpose(1, 2), C_time[start:stop].transpose(1, 2)
            states = driven[start:stop, :, channels].unsqueeze(1) * B_piece.unsqueeze(3)
            h[:, :, channels] = run(decay, states, h[:, :, channels], delta_piece, A_t)
            y[start:stop, :, channels] = states.mul_(C_piece.unsqueeze(3)).sum(dim=1)
            if ends is not None:
                ends[index, :, :, channels] = h[:, :, channels]

    y = y.addcmul_(u_time, D).mul_(torch.nn.functional.silu(_time_major(_real(z, z_scale))))
    last = h.permute(1, 2, 0).contiguous()
    return ScanResult(
        y=y.transpose(0, 1).to(out_dtype(u)),
        state=last if state_scale is None else quantize(last, state_scale),
        chunk_states=None if ends is None else ends.permute(2, 0, 3, 1),
    )


def _run_sequential(
    decay: torch.Tensor, increment: torch.Tensor, h: torch.Tensor, _delta: torch.Tensor, _A: torch.Tensor
) -> torch.Tensor:
    """Left to right; ``increment`` is overwritten by the states. Returns the last one."""
    for decay_t, state_t in zip(decay, increment, strict=True):
        h = torch.addcmul(state_t, decay_t, h, out=state_t)
    return h


def _run_chunked(
    decay: torch.Tensor, increment: torch.Tensor, h: torch.Tensor, delta: torch.Tensor, A: torch.Tensor
) -> torch.Tensor:
    """One chunk of the chunked order; ``increment`` is overwritten by the states. Returns the carry."""
    local = increment[0].clone()
    for decay_t, increment_t in zip(decay[1:], increment[1:], strict=True):
        torch.addcmul(increment_t, decay_t, local, out=local)
    _run_sequential(decay, increment, h, delta, A)
    return local.addcmul_(torch.exp(delta.sum(dim=0) * A), h)


def _channel_blocks(shape: torch.Size) -> Iterator[slice]:
    """Equal slices of the channels of an (n, b, d) state, each small enough for `_STEP_ELEMENTS`."""
    n, b, d = shape
    blocks = -(-n * b * d // _STEP_ELEMENTS)
    width = max(1, -(-d // blocks))
    for start in range(0, d, width):
        yield slice(start, min(start + width, d))


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, CHUNK):
        yield start, min(start + CHUNK, length)


def _time_major(x: torch.Tensor) -> torch.Tensor:
    """(b, c, l) to (l, b, c)."""
    return x.permute(2, 0, 1)


def _real(x: torch.Tensor, scale: Scale | None, requantize: bool = False) -> torch.Tensor:
    if scale is not None and x.dtype == torch.int8:
        return dequantize(x, scale)
    return x.float() if scale is None or not requantize else fake_quantize(x.float(), scale)


def _initial_state(
    state: torch.Tensor | None, state_scale: float | None, b: int, d: int, A: torch.Tensor
) -> torch.Tensor:
    if state is None:
        return A.new_zeros(A.shape[1], b, d)
    real = state if state_scale is None else dequantize(state, state_scale)
    # A copy even where the permuted state is contiguous (n = 1): the scan writes into it.
    return real.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def out_dtype(u: torch.Tensor) -> torch.dtype:
    """Of y: u's own, or float32 where u is int8."""
    return u.dtype if u.dtype in FLOAT_DTYPES else torch.float32


def check_scales(
    operands: Mapping[str, torch.Tensor], scales: Mapping[str, Scale | None], requantize_u: bool
) -> None:
    """Check the dtypes of u, dt, B, C and z, and that those that need a scale have one.

    Raises:
        ShapeError: they are not as `selective_scan` documents them.
    """
    for name, x in operands.items():
        if x.dtype not in (torch.int8, *FLOAT_DTYPES):
            raise ShapeError(
                f"selective_scan: `{name}` is {x.dtype}, expected int8, float32, float16 or bfloat16"
            )
        if x.dtype == torch.int8 and scales[name] is None:
            raise ShapeError(f"selective_scan: `{name}` is int8 and needs `{name.lower()}_scale`")
    if requantize_u and operands["u"].dtype != torch.int8 and scales["u"] is None:
        raise ShapeError("selective_scan: requantizing `u` needs `u_scale`")


def check_operands(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor,
    state: torch.Tensor | None,
    state_scale: float | None,
) -> tuple[int, int, int]:
    """Sizes (b, d, l) of operands that every backend accepts.

    Raises:
        ShapeError: a shape or dtype is not as `selective_scan` documents it.
    """
    if u.dim() != 3 or u.shape[2] < 1:
        raise ShapeError(f"selective_scan: `u` must be (b, d, l) with l >= 1, got {tuple(u.shape)}")
    b, d, l = u.shape
    n = A.shape[-1]
    wanted = {
        "dt": (dt, (b, d, l)),
        "z": (z, (b, d, l)),
        "A": (A, (d, n)),
        "B": (B, (b, n, l)),
        "C": (C, (b, n, l)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ShapeError(f"selective_scan: `{name}` must be {shape}, got {tuple(tensor.shape)}")
    if state is not None:
        dtype = torch.float32 if state_scale is None else torch.int8
        if state.shape != (b, d, n) or state.dtype != dtype:
            raise ShapeError(
                f"selective_scan: `state` must be {(b, d, n)} {dtype}, got {tuple(state.shape)} {state.dtype}"
            )
    return b, d, l
