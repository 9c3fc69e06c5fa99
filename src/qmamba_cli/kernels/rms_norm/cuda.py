"""RMSNorm on CUDA: one block a row."""

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import contiguous, launch, round_up
from qmamba_cli.quant.grid import reciprocal

SOURCE = "rms_norm/rms_norm.cu"
_WARP = 32
_MAX_THREADS = 256
_VECTOR = 4
_ALIGNMENT = 16

ENTRIES = tuple(f"rms_norm<{vector}, {out}>" for vector in (1, _VECTOR) for out in ("float", "signed char"))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, *, eps: float, out_scale: float | None = None
) -> torch.Tensor:
    """Root-mean-square normalization of the last axis, then the int8 grid if asked; see the reference.

    The order of the sum depends on d_model alone, so a row's bits do not depend on the other rows.

    Returns:
        (..., d_model) float32 within `tolerances.RMS_NORM` of the reference, or int8 in class grid.

    Raises:
        ShapeError: x or weight is not float32 or not on one GPU, weight has not d_model elements, or
            out_scale is not finite and > 0.
    """
    if x.dim() == 0 or x.dtype != torch.float32:
        raise ShapeError(
            f"rms_norm: `x` must be float32 with at least one axis, got {x.dtype} {tuple(x.shape)}"
        )
    d_model = x.shape[-1]
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != (d_model,)):
        raise ShapeError(
            f"rms_norm: `weight` must be float32 ({d_model},), got {weight.dtype} {tuple(weight.shape)}"
        )
    if weight is not None and weight.device != x.device:
        raise ShapeError(f"rms_norm: `weight` is on {weight.device}, expected {x.device} as `x`")
    inv_scale = 1.0 if out_scale is None else reciprocal(out_scale)
    x = _aligned(contiguous("x", x))
    gain = None if weight is None else _aligned(contiguous("weight", weight))
    out = torch.empty(x.shape, dtype=torch.float32 if out_scale is None else torch.int8, device=x.device)
    if x.numel() == 0:
        return out
    vector, threads = launch_shape(d_model)
    launch(
        SOURCE,
        f"rms_norm<{vector}, {'float' if out_scale is None else 'signed char'}>",
        grid=(x.numel() // d_model, 1, 1),
        block=(threads, 1, 1),
        args=(x, gain, out, np.int32(d_model), np.float32(eps), np.float32(inv_scale)),
        device=x.device,
    )
    return out


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
