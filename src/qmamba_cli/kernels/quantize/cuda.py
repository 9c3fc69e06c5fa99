"""The int8 grid on CUDA; every result equals the reference bit for bit."""

from typing import NamedTuple

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import contiguous, launch, require_cuda
from qmamba_cli.quant.grid import Scale, along_channels, reciprocal

SOURCE = "quantize/quantize.cu"
_TYPES = {torch.float32: "float", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "signed char"}
_FLOATS = tuple(dtype for dtype in _TYPES if dtype.is_floating_point)
ENTRIES = (
    *(f"convert_{rows}<signed char, float>" for rows in ("rows", "channels")),
    *(f"convert_{rows}<{_TYPES[dtype]}, signed char>" for rows in ("rows", "channels") for dtype in _FLOATS),
    *(f"quantize_token_{layout}<{_TYPES[dtype]}>" for layout in ("channels", "time") for dtype in _FLOATS),
)

_THREADS = 256
# Elements of a block: 4 groups of 4 a thread, as in the kernel.
_BLOCK_ELEMENTS = _THREADS * 16
# Rows that a block with scales of channels walks, so that it reads them once for as many.
_ROWS = 8
_WARP = 32
_MAX_GRID_Y = 65535


class Rows(NamedTuple):
    """A tensor as rows of contiguous elements, and an output whose rows are dense and in the same order."""

    x: torch.Tensor
    out: torch.Tensor
    rows: int
    inner: int
    stride: int


def quantize(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Any float to int8; see `reference.quantize`. Dense tensors and channel slices keep their axis order."""
    if isinstance(scale, torch.Tensor):
        return _convert_channels(x, _FLOATS, torch.int8, scale)
    return _convert(x, _FLOATS, torch.int8, reciprocal(scale))


def dequantize(q: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Int8 to float32; see `reference.dequantize`. Dense tensors and channel slices keep their axis order."""
    if isinstance(scale, torch.Tensor):
        return _convert_channels(q, (torch.int8,), torch.float32, scale)
    return _convert(q, (torch.int8,), torch.float32, scale)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 or a half to int8 with one scale a token; see `reference.quantize_per_token`.

    x (b, d, l) may have contiguous channels or contiguous time and any stride along the other; q gets the
    same axis contiguous, dense. Any other x is copied.

    Raises:
        ShapeError: x is not (b, d, l) float32 or a half on a GPU, or has no channels.
    """
    _require("x", x, _FLOATS)
    if x.dim() != 3 or x.shape[1] < 1:
        raise ShapeError(f"quantize_per_token: `x` must be (b, d, l) with d >= 1, got {tuple(x.shape)}")
    b, d, l = x.shape
    scale = torch.empty(b, l, device=x.device)
    channels = d == 1 or x.stride(1) == 1
    if not channels and l > 1 and x.stride(2) != 1:
        x = x.contiguous()
    if channels:
        q = torch.empty(b, l, d, dtype=torch.int8, device=x.device).transpose(1, 2)
    else:
        q = torch.empty(b, d, l, dtype=torch.int8, device=x.device)
    if b == 0 or l == 0:
        return q, scale
    shape = (np.int32(d), np.int32(l), np.int64(x.stride(0)))
    if channels:
        vector = _aligned(x, x.stride(0) if b > 1 else 0, x.stride(2) if l > 1 else 0) and d % 4 == 0
        launch(
            SOURCE,
            f"quantize_token_channels<{_TYPES[x.dtype]}>",
            grid=(l, b, 1),
            block=(_THREADS, 1, 1),
            args=[x, q, scale, *shape, np.int64(x.stride(2)), np.int32(vector)],
            device=x.device,
        )
    else:
        launch(
            SOURCE,
            f"quantize_token_time<{_TYPES[x.dtype]}>",
            grid=(-(-l // _WARP), b, 1),
            block=(_WARP, _WARP, 1),
            args=[x, q, scale, *shape, np.int64(x.stride(1))],
            device=x.device,
        )
    return q, scale


def as_rows(x: torch.Tensor, dtype: torch.dtype) -> Rows:
    """How an elementwise kernel walks x, with a new output of ``dtype``; x is copied if nothing else fits."""
    out = torch.empty_like(x, dtype=dtype)
    if out.stride() == x.stride():
        return Rows(x, out, 1, x.numel(), x.numel())
    # A slice of the channels of a wider tensor: (b, d, l) as a view of (b, l, d).
    channels_last = x.transpose(1, 2) if x.dim() == 3 and x.stride(1) == 1 else x
    *_, inner = channels_last.shape if x.dim() else (1,)
    if x.dim() >= 2 and channels_last.stride(-1) == 1 and _one_stride(channels_last):
        out = torch.empty(channels_last.shape, dtype=dtype, device=x.device)
        rows = channels_last.numel() // max(inner, 1)
        back = out if channels_last is x else out.transpose(1, 2)
        return Rows(x, back, rows, inner, channels_last.stride(-2))
    x = x.contiguous()
    return Rows(x, torch.empty_like(x, dtype=dtype), 1, x.numel(), x.numel())


def _one_stride(x: torch.Tensor) -> bool:
    """Whether all axes but the last are walked by the stride of the one before the last."""
    return all(x.shape[i] == 1 or x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))


def _convert(
    x: torch.Tensor, wanted: tuple[torch.dtype, ...], dtype: torch.dtype, factor: float
) -> torch.Tensor:
    _require("x", x, wanted)
    view = as_rows(x, dtype)
    if view.out.numel() == 0:
        return view.out
    entry = f"convert_rows<{_TYPES[x.dtype]}, {_TYPES[dtype]}>"
    vector = _aligned(view.x, *((view.stride,) if view.rows > 1 else ()))
    vector = vector and (view.rows == 1 or view.inner % 4 == 0)
    launch(
        SOURCE,
        entry,
        grid=(-(-view.inner // _BLOCK_ELEMENTS), min(view.rows, _MAX_GRID_Y), 1),
        block=(_THREADS, 1, 1),
        args=[
            view.x,
            view.out,
            np.int64(view.rows),
            np.int64(view.inner),
            np.int64(view.stride),
            np.int32(vector),
            np.float32(factor),
        ],
        device=x.device,
    )
    return view.out


def _convert_channels(
    x: torch.Tensor, wanted: tuple[torch.dtype, ...], dtype: torch.dtype, scale: torch.Tensor
) -> torch.Tensor:
    """The same with a scale a channel of x (b, c, ...); a row is a token where channels are contiguous."""
    _require("x", x, wanted)
    along_channels(scale, x)
    b, c = x.shape[:2]
    flat = x.reshape(b, c, -1)
    tokens = c > 1 and flat.stride(1) == 1
    view = flat.transpose(1, 2) if tokens else flat
    _, count, inner = view.shape
    if (inner > 1 and view.stride(2) != 1) or (b > 1 and count > 1 and not _one_stride(view)):
        view = view.contiguous()
    out = torch.empty(view.shape, dtype=dtype, device=x.device)
    if out.numel():
        stride = view.stride(1 if count > 1 else 0)
        vector = inner % 4 == 0 and _aligned(view, stride)
        launch(
            SOURCE,
            f"convert_channels<{_TYPES[x.dtype]}, {_TYPES[dtype]}>",
            grid=(-(-inner // (4 * _THREADS)), min(-(-b * count // _ROWS), _MAX_GRID_Y), 1),
            block=(_THREADS, 1, 1),
            args=[
                view,
                out,
                contiguous("scale", scale),
                *(np.int64(value) for value in (b * count, inner, stride)),
                *(np.int32(value) for value in (0 if tokens else c, vector)),
            ],
            device=x.device,
        )
    return (out.transpose(1, 2) if tokens else out).reshape(x.shape)


def _aligned(x: torch.Tensor, *strides: int) -> bool:
    """Whether groups of four never straddle; strides are in elements."""
    return x.data_ptr() % (4 * x.element_size()) == 0 and all(stride % 4 == 0 for stride in strides)


def _require(name: str, x: torch.Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    require_cuda(name, x)
    if x.dtype not in wanted:
        raise ShapeError(f"`{name}` is {x.dtype}, expected {' or '.join(str(dtype) for dtype in wanted)}")
