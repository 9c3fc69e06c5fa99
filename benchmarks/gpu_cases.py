"""Kernel shapes that are timed on a GPU, with the floors, goals and peers measured on one NVIDIA H200.

A peer is the best fp16 kernel of another project at the same shape. Inputs lie as the model lays them out:
channels contiguous, z and B, C as slices of wider rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qmamba_cli.kernels.backend import Backend
from qmamba_cli.modes import ScanOrder

D_STATE = 16
# d_inner, batch, length; then floor, goal and peer in ms.
SCAN_SHAPES = (
    (5120, 1, 1024, 0.020, 0.045, None),
    (5120, 1, 2048, 0.040, 0.095, 0.194),
    (5120, 8, 1024, 0.160, 0.27, 0.679),
    (1536, 8, 1024, 0.048, 0.10, 0.217),
    (1536, 1, 1024, 0.006, 0.02, 0.0464),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCase:
    """One timed kernel.

    Attributes:
        name: operator, grids and shape.
        make: allocates inputs on the GPU and returns the call that is timed.
        bytes: bytes read and written at least once.
        exps: exponentials of the recurrence; 0 where there are none.
        floor_ms: what the bytes or the exponentials alone take, or None.
        goal_ms: what the kernel should reach, or None.
        peer_ms: the best fp16 peer, or None.
    """

    name: str
    make: Callable[[Backend], Callable[[], object]]
    bytes: int
    exps: int = 0
    floor_ms: float | None = None
    goal_ms: float | None = None
    peer_ms: float | None = None


def cases() -> Iterator[GpuCase]:
    """Every case, operator by operator."""
    for e, b, length, floor, goal, peer in (
        (5120, 1, 2048, 0.0049, 0.0115, 0.0160),
        (5120, 8, 1024, 0.0196, 0.028, 0.0525),
        (1536, 8, 1024, None, None, None),
    ):
        shape = f"e={e} b={b} l={length}"
        yield GpuCase(
            name=f"causal_conv1d i8 to i8, {shape}",
            make=_conv(e, b, length, 0.05),
            bytes=2 * e * b * length,
            floor_ms=floor,
            goal_ms=goal,
            peer_ms=peer,
        )
        yield GpuCase(
            name=f"causal_conv1d i8 to f32, {shape}",
            make=_conv(e, b, length, None),
            bytes=5 * e * b * length,
            floor_ms=0.0123 if b == 1 else None,
            goal_ms=0.0172 if b == 1 else None,
            peer_ms=0.0260 if b == 1 else None,
        )
        for per_token in (False, True):
            yield GpuCase(
                name=f"causal_conv1d i8{' by token' if per_token else ''} to f32 and i8, {shape}",
                make=_conv_both(e, b, length, per_token=per_token),
                bytes=6 * e * b * length,
                floor_ms=0.0147 if b == 1 else None,
            )
    for e, b, length, floor, goal, peer in SCAN_SHAPES:
        for order in ScanOrder:
            goals = (floor, goal, peer) if order is ScanOrder.CHUNKED else (None, None, None)
            yield GpuCase(
                name=f"selective_scan {order}, i8 u, e={e} b={b} l={length}",
                make=scan_call(e, b, length, order),
                bytes=7 * e * b * length,
                exps=D_STATE * e * b * length,
                floor_ms=goals[0],
                goal_ms=goals[1],
                peer_ms=goals[2],
            )
        yield GpuCase(
            name=f"selective_scan chunked, f16, e={e} b={b} l={length}",
            make=scan_call(e, b, length, ScanOrder.CHUNKED, torch.float16),
            bytes=8 * e * b * length,
            exps=D_STATE * e * b * length,
            floor_ms=floor,
            peer_ms=peer,
        )
    for rows, width, floor, goal, peer in (
        (1024, 5120, 0.0037, None, None),
        (2048, 5120, 0.0074, 0.018, 0.0345),
        (8192, 5120, 0.0295, 0.050, 0.1126),
        (8192, 1536, 0.0088, None, 0.0229),
    ):
        for dtype, size in ((torch.float16, 2), (torch.float32, 4)):
            half = dtype is torch.float16
            yield GpuCase(
                name=f"hadamard {'f16' if half else 'f32'} to i8, {rows} x {width}",
                make=_hadamard(rows, width, dtype),
                bytes=(size + 1) * rows * width,
                floor_ms=floor if half else round(floor * 5 / 3, 4),
                goal_ms=goal if half else None,
                peer_ms=peer if half else None,
            )


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")


def _conv_operands(e: int, b: int, length: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """x, weight and bias of a convolution, and the scales of its taps."""
    x = _codes(b, length, 2 * e).transpose(1, 2)[:, :e]
    bias = torch.randn(e, device="cuda") * 0.1
    return (x, _codes(e, 4), bias), torch.rand(e, device="cuda") * 0.002 + 1e-4


def _conv(e: int, b: int, length: int, out_scale: float | None) -> Callable[[Backend], Callable[[], object]]:
    def make(ops: Backend) -> Callable[[], object]:
        operands, scale = _conv_operands(e, b, length)
        return lambda: ops.causal_conv1d(*operands, x_scale=0.03, weight_scale=scale, out_scale=out_scale)

    return make


def _conv_both(e: int, b: int, length: int, *, per_token: bool) -> Callable[[Backend], Callable[[], object]]:
    def make(ops: Backend) -> Callable[[], object]:
        operands, scale = _conv_operands(e, b, length)
        x_scale = torch.rand(b, length, device="cuda") * 0.05 + 1e-3 if per_token else 0.03
        return lambda: ops.causal_conv1d_both(*operands, x_scale=x_scale, weight_scale=scale, out_scale=0.05)

    return make


def scan_call(
    e: int, b: int, length: int, order: ScanOrder, dtype: torch.dtype = torch.int8
) -> Callable[[Backend], Callable[[], object]]:
    """A scan of (b, e, length) whose operands are all of ``dtype``."""

    def make(ops: Backend) -> Callable[[], object]:
        def operand(width: int) -> torch.Tensor:
            codes = _codes(b, length, width).transpose(1, 2)
            return codes if dtype == torch.int8 else (codes * 0.02).to(dtype)

        n, rank = D_STATE, e // 32
        u, dt, z, low = operand(e), operand(e), operand(2 * e)[:, e:], operand(rank + 2 * n)
        A = -torch.arange(1, n + 1, dtype=torch.float32, device="cuda").expand(e, n).contiguous()
        D, dt_bias = torch.randn(e, device="cuda"), torch.randn(e, device="cuda") - 3
        B, C = low[:, rank : rank + n], low[:, rank + n :]
        scales = dict.fromkeys(("u_scale", "dt_scale", "b_scale", "c_scale", "z_scale"), 0.02)
        scales |= {"state_scale": 0.01}
        if dtype != torch.int8:
            scales = {}
        return lambda: ops.selective_scan(u, dt, A, B, C, D, z, dt_bias, order=order, **scales)

    return make


def _hadamard(rows: int, width: int, dtype: torch.dtype) -> Callable[[Backend], Callable[[], object]]:
    def make(ops: Backend) -> Callable[[], object]:
        y = torch.randn(rows, width, device="cuda").to(dtype)
        return lambda: ops.hadamard(y, out_scale=0.03)

    return make
