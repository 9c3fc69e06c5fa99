"""The place of the largest value on CUDA; `reference` is the definition."""

import numpy as np
import torch

from qmamba_cli.kernels._launch import launch, require_cuda
from qmamba_cli.kernels.argmax.reference import check

SOURCE = "argmax/argmax.cu"
_VECTOR = 4
ENTRIES: tuple[str, ...] = ("argmax<1>", f"argmax<{_VECTOR}>")
_THREADS = 1024
_ALIGNMENT = 16


def argmax(x: torch.Tensor) -> torch.Tensor:
    """`reference.argmax` on CUDA tensors, the same indices.

    Raises:
        ShapeError: x is not as the reference's, or not on a GPU.
    """
    check(x)
    require_cuda("x", x)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    whole = all(count % _VECTOR == 0 for count in (rows.stride(0), rows.shape[1]))
    vector = _VECTOR if whole and rows.data_ptr() % _ALIGNMENT == 0 else 1
    if out.numel():
        launch(
            SOURCE,
            f"argmax<{vector}>",
            grid=(rows.shape[0], 1, 1),
            block=(_THREADS, 1, 1),
            args=(rows, out, np.int64(rows.stride(0)), np.int32(rows.shape[1])),
            device=x.device,
        )
    return out
