"""Hadamard transform on CUDA: one kernel for every order whose row fits in shared memory."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import contiguous, launch, round_up, sm_count
from qmamba_cli.kernels.hadamard import reference
from qmamba_cli.kernels.hadamard.matrix import HadamardPlan, core_matrix, plan_for
from qmamba_cli.quant.grid import reciprocal

SOURCE = "hadamard/hadamard.cu"
_TYPES = {torch.float32: "float", torch.float16: "F16"}
_INT8 = "signed char"
# Cores compiled into the kernel; other cores read their matrix at run time, at about K products an element.
_COMPILED_CORES = (12, 20, 28)
# The core of a power of two: Sylvester's matrix of this order.
_SYLVESTER_CORE = 16
# Elements that a thread stores at once, and the largest order that one thread transforms alone.
_CHUNK = 16
_MAX_SYLVESTER_BITS = 10
# What every GPU from compute capability 8.0 on lends to one block.
_MAX_SHARED_BYTES = 99 * 1024
# Elements a block, where rows are shorter: enough for every thread to own two columns of a core.
_TILE_ELEMENTS = 4096
_THREADS = 128
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How rows of one order are laid over blocks.

    Attributes:
        core: K, the order of the slowest factor.
        compiled: whether the kernel has this core's matrix built in.
        bits: log2 of the Sylvester part.
        segment_stride: floats between two segments of the Sylvester part in shared memory.
        tile_rows: rows a block.
        threads: threads a block.
        shared_bytes: dynamic shared memory a block.
    """

    core: int
    compiled: bool
    bits: int
    segment_stride: int
    tile_rows: int
    threads: int
    shared_bytes: int


def hadamard(x: torch.Tensor, *, out_scale: float | None = None) -> torch.Tensor:
    """Orthonormal Hadamard transform of the last axis, then the int8 grid if asked; see the reference.

    x is float32 or float16, on a GPU; sums are float32 whatever the input, and an int8 output is rounded once
    from the float32 result. A row's bits do not depend on the other rows. bfloat16 is widened to float32 and
    narrowed again; float64, and orders too long for shared memory (above 16 384), run the reference's matrix
    products on the GPU.

    Returns:
        (..., n) of x's dtype in class real, or int8 in class grid.

    Raises:
        ShapeError: x is not floating, has no last axis or is not on a GPU, or out_scale is not finite
            and > 0.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(
            f"hadamard: `x` must be floating with at least one axis, got {x.dtype} {tuple(x.shape)}"
        )
    inv_scale = 1.0 if out_scale is None else reciprocal(out_scale)
    x = contiguous("x", x)
    if x.dtype not in (*_TYPES, torch.float64):
        y = hadamard(x.float(), out_scale=out_scale)
        return y.to(x.dtype) if out_scale is None else y
    if x.numel() == 0:
        return torch.empty_like(x, dtype=x.dtype if out_scale is None else torch.int8)
    plan = plan_for(x.shape[-1])
    rows = x.numel() // plan.order
    small = plan.core == 1 and plan.order <= _CHUNK
    config = None if small else _config(plan, rows, sm_count(x.device))
    if x.dtype == torch.float64 or not (small or config):
        y = reference.hadamard(x if x.dtype == torch.float64 else x.float(), out_scale=out_scale)
        return y.to(x.dtype) if out_scale is None else y
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    out = torch.empty(x.shape, dtype=x.dtype if out_scale is None else torch.int8, device=x.device)
    types = f"{_TYPES[x.dtype]}, {_TYPES.get(out.dtype, _INT8)}"
    scales = (np.float32(1.0 / math.sqrt(plan.order)), np.float32(inv_scale))
    if config is None:
        _launch_small(x, out, types, plan.order.bit_length() - 1, scales)
    else:
        _launch_rows(x, out, types, rows, config, scales)
    return out


def _launch_small(
    x: torch.Tensor, out: torch.Tensor, types: str, bits: int, scales: tuple[np.float32, np.float32]
) -> None:
    launch(
        SOURCE,
        f"hadamard_small<{types}>",
        grid=(-(-x.numel() // (_CHUNK * _THREADS)), 1, 1),
        block=(_THREADS, 1, 1),
        args=(x, out, np.int64(x.numel()), np.int32(bits), *scales),
        device=x.device,
    )


def _launch_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    types: str,
    rows: int,
    config: LaunchConfig,
    scales: tuple[np.float32, np.float32],
) -> None:
    layout = (np.int32(config.tile_rows), np.int32(config.bits), np.int32(config.segment_stride))
    matrix = None if config.compiled else _transposed_core(config.core, x.device)
    launch(
        SOURCE,
        f"hadamard<{types}, {_core_arguments(config.core if config.compiled else 0)}>",
        grid=(-(-rows // config.tile_rows), 1, 1),
        block=(config.threads, 1, 1),
        args=(x, out, np.int64(rows), *layout, *scales, np.int32(config.core), matrix),
        device=x.device,
        shared_bytes=config.shared_bytes,
    )


# Bounded: prompts come in many lengths.
@lru_cache(maxsize=1024)
def _config(plan: HadamardPlan, rows: int, processors: int) -> LaunchConfig | None:
    """The layout, or None where a row does not fit."""
    core = _SYLVESTER_CORE if plan.core == 1 else plan.core
    sylvester = plan.order // core
    bits = sylvester.bit_length() - 1
    stride = segment_stride(bits)
    # One column a thread has no neighbour to be loaded with.
    compiled = core in (_SYLVESTER_CORE, *_COMPILED_CORES) and bits > 0
    # Short rows share a block, but not where that would leave multiprocessors without one.
    tile_rows = 1
    while 2 * tile_rows * plan.order <= _TILE_ELEMENTS and 2 * tile_rows * processors <= rows:
        tile_rows *= 2
    while tile_rows * plan.order % _CHUNK:
        tile_rows *= 2
    shared_bytes = tile_rows * core * stride * 4
    if bits > _MAX_SYLVESTER_BITS or shared_bytes > _MAX_SHARED_BYTES:
        return None
    return LaunchConfig(core, compiled, bits, stride, tile_rows, _THREADS, shared_bytes)


def segment_stride(bits: int) -> int:
    """Floats of shared memory for 2^bits elements with the kernel's padding.

    From 2^5 on, 4 floats follow every 32 and 16 every 256, as in the kernel's `place`; where the rest of the
    length would put two neighbouring segments into the same banks, they are shifted by half of the banks.
    """
    size = 1 << bits
    if bits < 4:
        return size
    if bits == 4:
        return size + 4
    padded = size + 4 * (size >> 5) + 16 * (size >> 8)
    return padded if bits > 8 else round_up(padded - 16, 32) + 16


def _core_arguments(core: int) -> str:
    """Template arguments of a core: its order, then its rows as bit masks of the entries that are -1."""
    if core not in _COMPILED_CORES:
        return str(core)
    negative = core_matrix(core) < 0
    masks = (sum(1 << j for j, entry in enumerate(row) if entry) for row in negative.tolist())
    return ", ".join([str(core), *(f"{mask:#x}u" for mask in masks)])


@cache
def _transposed_core(core: int, device: torch.device) -> torch.Tensor:
    return core_matrix(core).T.contiguous().to(device=device, dtype=torch.float32)


def _entries() -> tuple[str, ...]:
    pairs = [f"{name}, {out}" for name in _TYPES.values() for out in (name, _INT8)]
    cores = (0, _SYLVESTER_CORE, *_COMPILED_CORES)
    rows = [f"hadamard<{pair}, {_core_arguments(core)}>" for pair in pairs for core in cores]
    return (*rows, *(f"hadamard_small<{pair}>" for pair in pairs))


ENTRIES = _entries()
