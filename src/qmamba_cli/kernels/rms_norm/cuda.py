"""RMSNorm on CUDA, alone or after the residual's addition: one block a row."""

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import contiguous, launch, round_up
from qmamba_cli.quant.grid import reciprocal

SOURCE = "rms_norm/rms_norm.cu"
_WARP = 32
_MAX_THREADS = 256
_VECTOR = 4
# Up to these rows, as in a decode step, the start of a launch takes as long as its work.
_FEW_ROWS = 64
_ALIGNMENT = 16

_TYPES = {torch.float32: "float", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "signed char"}
_FLOATS = tuple(dtype for dtype in _TYPES if dtype.is_floating_point)

_NO_DELTA = "Nothing"

# Rows of any width take a float32 delta only: it is rare, and a half is widened first.
ENTRIES = (
    *(f"rms_norm<1, {delta}, {out}>" for delta in (_NO_DELTA, "float") for out in _TYPES.values()),
    *(
        f"rms_norm<{_VECTOR}, {delta}, {out}>"
        for delta in (_NO_DELTA, *(_TYPES[dtype] for dtype in _FLOATS))
        for out in _TYPES.values()
    ),
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    out_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Root-mean-square normalization of the last axis, then the int8 grid if asked; see the reference.

    The order of the sum depends on d_model alone, so a row's bits do not depend on the other rows.

    Returns:
        (..., d_model) within `tolerances.RMS_NORM` of the reference, or int8 in class grid.

    Raises:
        ShapeError: x or weight is not float32 or not on one GPU, weight has not d_model elements, out_scale
            is not finite and > 0, or out_dtype is not one of the reference's.
    """
    return _normalize(x, None, weight, eps, out_scale, out_dtype)[0]


def add_rms_norm(
    residual: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    out_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual's addition and `rms_norm` in one pass over memory; see the reference.

    The new residual stream is exact: one float32 addition an element.

    Raises:
        ShapeError: as `rms_norm`, or delta is not of residual's shape and float32, float16 or bfloat16.
    """
    if delta.shape != residual.shape or delta.dtype not in _FLOATS:
        raise ShapeError(
            f"add_rms_norm: `delta` is {delta.dtype} {tuple(delta.shape)}, expected a float of "
            f"{tuple(residual.shape)} as `residual`"
        )
    out, added = _normalize(residual, delta, weight, eps, out_scale, out_dtype)
    assert added is not None
    return out, added


def _normalize(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    out_scale: float | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch: the output, and x + delta where there is a delta."""
    if x.dim() == 0 or x.dtype != torch.float32:
        raise ShapeError(
            f"rms_norm: `x` must be float32 with at least one axis, got {x.dtype} {tuple(x.shape)}"
        )
    d_model = x.shape[-1]
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != (d_model,)):
        raise ShapeError(
            f"rms_norm: `weight` must be float32 ({d_model},), got {weight.dtype} {tuple(weight.shape)}"
        )
    if out_dtype is not None and out_dtype not in _FLOATS:
        raise ShapeError(f"rms_norm: `out_dtype` is {out_dtype}, expected float32, float16 or bfloat16")
    for name, tensor in (("weight", weight), ("delta", delta)):
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(f"rms_norm: `{name}` is on {tensor.device}, expected {x.device} as `x`")
    inv_scale = 1.0 if out_scale is None else reciprocal(out_scale)
    x = _aligned(contiguous("x", x))
    gain = None if weight is None else _aligned(contiguous("weight", weight))
    vector, threads = launch_shape(d_model)
    more = None
    if delta is not None:
        more = _aligned(contiguous("delta", delta if vector > 1 else delta.float()))
    dtype = torch.int8 if out_scale is not None else out_dtype or torch.float32
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    added = None if more is None else torch.empty_like(x)
    if x.numel() == 0:
        return out, added
    rows = x.numel() // d_model
    launch(
        SOURCE,
        f"rms_norm<{vector}, {_NO_DELTA if more is None else _TYPES[more.dtype]}, {_TYPES[dtype]}>",
        grid=(rows, 1, 1),
        block=(threads, 1, 1),
        args=(x, more, gain, added, out, np.int32(d_model), np.float32(eps), np.float32(inv_scale)),
        device=x.device,
        overlap=rows <= _FEW_ROWS,
    )
    return out, added


def launch_shape(d_model: int) -> tuple[int, int]:
    """Elements a vector and threads a block.

    Decided by the width alone: the order of the sum follows from them, and prefill and decode must agree.
    """
    vector = _VECTOR if d_model % _VECTOR == 0 else 1
    # Two vectors a thread keep enough loads in flight; 256 threads let eight rows share a multiprocessor.
    wanted = -(-d_model // (2 * vector))
    return vector, min(round_up(wanted, _WARP), _MAX_THREADS)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where a view starts off the boundary of vector loads; a fresh tensor never does."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
