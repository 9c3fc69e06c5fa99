"""Hadamard transform on CUDA: a kernel for orders that fit in shared memory, and one for those of models."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import Arg, contiguous, launch, round_up, sm_count
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
# Orders K * 2^bits with a kernel to int8 on tensor cores: 1536, 2048, 3072, 4096, 5120; and with another from
# float32 to int8 whose blocks stay too: 8192, 7168.
_TENSOR = ((12, 7), (16, 7), (12, 8), (16, 8), (20, 8))
_STREAMS = ((16, 9), (28, 8))
# By dtype and bits: rows of a block on tensor cores, its warps, and blocks that its registers allow.
_TENSOR_BLOCKS = {
    (torch.float16, 7): (4, 4, 4),
    (torch.float16, 8): (4, 4, 3),
    (torch.float32, 7): (8, 8, 1),
    (torch.float32, 8): (4, 8, 1),
}
# One fragment of the matrix for all lanes.
_FRAGMENT_BYTES = 32 * 16
_BARRIER_BYTES = 8
# Shared memory that a block takes beside its own.
_RESERVED_SHARED_BYTES = 1024 + 16
# Elements that a thread stores at once, and the largest order that one thread transforms alone.
_CHUNK = 16
_MAX_SYLVESTER_BITS = 10
# What every GPU from compute capability 8.0 on lends to one block.
_MAX_SHARED_BYTES = 99 * 1024
# Elements a block, where rows are shorter: enough for every thread to own two columns of a core.
_TILE_ELEMENTS = 4096
_THREADS = 128
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How rows of one order are laid over blocks.

    Attributes:
        core: K, the order of the slowest factor.
        compiled: whether the kernel has this core's matrix built in.
        bits: log2 of the Sylvester part.
        segment_stride: floats between two segments of the Sylvester part in shared memory.
        tile_rows: rows a block works on at a time.
        threads: threads a block.
        shared_bytes: dynamic shared memory a block.
        blocks: blocks; fewer than there are tiles if a block takes several in turn.
        stage_bytes: of the shared memory, what holds the tile on the way; 0 where a block has one tile.
    """

    core: int
    compiled: bool
    bits: int
    segment_stride: int
    tile_rows: int
    threads: int
    shared_bytes: int
    blocks: int
    stage_bytes: int = 0


def hadamard(x: torch.Tensor, *, out_scale: float | None = None) -> torch.Tensor:
    """Orthonormal Hadamard transform of the last axis, then the int8 grid if asked; see the reference.

    x is float32, float16 or bfloat16, on a GPU; sums are float32 whatever the input, and the output is
    rounded once from the float32 result. A row's bits do not depend on the other rows. bfloat16, and float16
    where it becomes int8 at an order without a kernel for that, are widened first; float64, and orders too
    long for shared memory (above 16 384), run the reference's matrix products on the GPU.

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
    if x.numel() == 0:
        return torch.empty_like(x, dtype=x.dtype if out_scale is None else torch.int8)
    plan = plan_for(x.shape[-1])
    quantized = out_scale is not None
    tensor = _factors(plan) in _TENSOR
    if x.dtype == torch.bfloat16 or (quantized and x.dtype == torch.float16 and not tensor):
        y = hadamard(x.float(), out_scale=out_scale)
        return y if quantized else y.to(x.dtype)
    small = plan.core == 1 and plan.order <= _CHUNK
    config = None if small or x.dtype not in _TYPES else _config(plan, x, quantized)
    if x.dtype not in _TYPES or not (small or config):
        return reference.hadamard(x, out_scale=out_scale)
    return transform(x, plan, config, inv_scale if quantized else None)


def transform(
    x: torch.Tensor, plan: HadamardPlan, config: LaunchConfig | None, inv_scale: float | None
) -> torch.Tensor:
    """One launch for a dense x of a kernel's dtype; benchmarks name the ``config`` themselves.

    Args:
        x: (..., width) of float32 or float16.
        plan: of that width.
        config: the layout, or None for orders that one thread transforms alone.
        inv_scale: steps a real unit of an int8 output, or None for x's dtype.
    """
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    out = torch.empty(x.shape, dtype=x.dtype if inv_scale is None else torch.int8, device=x.device)
    types = f"{_TYPES[x.dtype]}, {_TYPES.get(out.dtype, _INT8)}"
    factors = (np.float32(1.0 / math.sqrt(plan.order)), np.float32(inv_scale or 1.0))
    rows = x.numel() // plan.order
    if config is None:
        _launch_small(x, out, types, plan.order.bit_length() - 1, factors)
        return out
    entry, layout = _instance(x, types, config, factors)
    launch(
        SOURCE,
        entry,
        grid=(config.blocks, 1, 1),
        block=(config.threads, 1, 1),
        args=(x, out, np.int64(rows), *layout),
        device=x.device,
        shared_bytes=config.shared_bytes,
    )
    return out


def _instance(
    x: torch.Tensor, types: str, config: LaunchConfig, scales: tuple[np.float32, np.float32]
) -> tuple[str, tuple[Arg, ...]]:
    """The kernel of a layout, and its parameters after the number of rows."""
    if not config.stage_bytes:
        matrix = None if config.compiled else _transposed_core(config.core, x.device)
        layout = (np.int32(config.tile_rows), np.int32(config.bits), np.int32(config.segment_stride))
        entry = f"hadamard<{types}, {core_arguments(config.core if config.compiled else 0)}>"
        return entry, (*layout, *scales, np.int32(config.core), matrix)
    if (config.core, config.bits) in _TENSOR:
        return _tensor_entry(x.dtype, config.core, config.bits), (np.float32(scales[0] * scales[1]),)
    return _stream_entry(config.core, config.bits), (
        np.int32(config.tile_rows),
        np.int32(config.stage_bytes),
        *scales,
    )


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


def _config(plan: HadamardPlan, x: torch.Tensor, quantized: bool) -> LaunchConfig | None:
    """The layout, or None where a row does not fit."""
    rows, processors = x.numel() // plan.order, sm_count(x.device)
    if quantized and _factors(plan) in (*_TENSOR, *_STREAMS):
        shared = _shared_bytes_per_multiprocessor(x.device)
        if _factors(plan) in _TENSOR:
            return tensor_config(plan, rows, x.dtype, processors, shared)
        return stream_config(plan, rows, x.element_size(), processors, shared)
    return row_config(plan, rows, processors)


def _factors(plan: HadamardPlan) -> tuple[int, int]:
    """K, with Sylvester's core for a power of two, and log2 of the rest."""
    core = _SYLVESTER_CORE if plan.core == 1 else plan.core
    return core, (plan.order // core).bit_length() - 1


# Bounded: prompts come in many lengths.
@lru_cache(maxsize=1024)
def row_config(plan: HadamardPlan, rows: int, processors: int) -> LaunchConfig | None:
    """A block for each tile of rows, or None where a row does not fit."""
    core, bits = _factors(plan)
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
    return LaunchConfig(
        core=core,
        compiled=compiled,
        bits=bits,
        segment_stride=stride,
        tile_rows=tile_rows,
        threads=_THREADS,
        shared_bytes=shared_bytes,
        blocks=-(-rows // tile_rows),
    )


@lru_cache(maxsize=1024)
def stream_config(
    plan: HadamardPlan,
    rows: int,
    element_size: int,
    processors: int,
    shared_bytes_per_processor: int,
    *,
    threads: int | None = None,
    resident: int | None = None,
) -> LaunchConfig:
    """Blocks that stay and take tiles in turn, as many as fit, each with equally many tiles.

    Args:
        plan: of one of the orders that have a kernel for it.
        rows: rows of that order.
        element_size: bytes of an input element.
        processors: multiprocessors.
        shared_bytes_per_processor: shared memory of one.
        threads: threads a block, where not the default.
        resident: blocks a multiprocessor, where not as many as fit.
    """
    core, bits = _factors(plan)
    stride = segment_stride(bits)
    stage_bytes = plan.order * element_size
    shared_bytes = stage_bytes + core * stride * 4
    if resident is None:
        fitting = shared_bytes_per_processor // (shared_bytes + _RESERVED_SHARED_BYTES)
        resident = max(1, min(fitting, 2 if core > 20 else 5))
    turns = -(-rows // (processors * resident))
    return LaunchConfig(
        core=core,
        compiled=True,
        bits=bits,
        segment_stride=stride,
        tile_rows=1,
        threads=threads or max(_THREADS, 8 * core),
        shared_bytes=shared_bytes,
        blocks=-(-rows // turns),
        stage_bytes=stage_bytes,
    )


@lru_cache(maxsize=1024)
def tensor_config(
    plan: HadamardPlan, rows: int, dtype: torch.dtype, processors: int, shared_bytes_per_processor: int
) -> LaunchConfig:
    """Blocks that stay and take `tile_rows` rows in turn: the fewest that need no more turns than all.

    Args:
        plan: of one of the orders that the tensor cores take.
        rows: rows of that order.
        dtype: of the rows, float16 or float32.
        processors: multiprocessors.
        shared_bytes_per_processor: shared memory of one.
    """
    core, bits = _factors(plan)
    tile_rows, warps, by_registers = _TENSOR_BLOCKS[dtype, bits]
    stage_bytes = tile_rows * plan.order * dtype.itemsize
    beside = (core // 4) ** 2 * _FRAGMENT_BYTES if dtype == torch.float16 else tile_rows * _BARRIER_BYTES
    shared_bytes = stage_bytes + beside
    fitting = shared_bytes_per_processor // (shared_bytes + _RESERVED_SHARED_BYTES)
    tiles = -(-rows // tile_rows)

    def turns(resident: int) -> int:
        return -(-tiles // (processors * resident))

    most = max(1, min(fitting, by_registers))
    resident = next(count for count in range(1, most + 1) if turns(count) == turns(most))
    return LaunchConfig(
        core=core,
        compiled=True,
        bits=bits,
        segment_stride=segment_stride(bits),
        tile_rows=tile_rows,
        threads=32 * warps,
        shared_bytes=shared_bytes,
        blocks=min(tiles, processors * resident),
        stage_bytes=stage_bytes,
    )


@cache
def _shared_bytes_per_multiprocessor(device: torch.device) -> int:
    known = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", None)
    if known is not None:
        return int(known)
    # torch versions without the number.
    kilobytes = {(8, 0): 164, (9, 0): 228, (10, 0): 228}.get(torch.cuda.get_device_capability(device), 100)
    return kilobytes * 1024


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


def core_arguments(core: int) -> str:
    """Template arguments of a core: its order, then its rows as bit masks of the entries that are -1."""
    if core not in _COMPILED_CORES:
        return str(core)
    negative = core_matrix(core) < 0
    masks = (sum(1 << j for j, entry in enumerate(row) if entry) for row in negative.tolist())
    return ", ".join([str(core), *(f"{mask:#x}u" for mask in masks)])


@cache
def _transposed_core(core: int, device: torch.device) -> torch.Tensor:
    return core_matrix(core).T.contiguous().to(device=device, dtype=torch.float32)


def _stream_entry(core: int, bits: int) -> str:
    return f"hadamard_stream<{bits}, {core_arguments(core)}>"


def _tensor_entry(dtype: torch.dtype, core: int, bits: int) -> str:
    kernel = "hadamard_tensor" if dtype == torch.float16 else "hadamard_lanes"
    return f"{kernel}<{bits}, {core_arguments(core)}>"


def _entries() -> tuple[str, ...]:
    pairs = ("float, float", "F16, F16", "float, signed char")
    cores = (0, _SYLVESTER_CORE, *_COMPILED_CORES)
    rows = [f"hadamard<{pair}, {core_arguments(core)}>" for pair in pairs for core in cores]
    streams = [_stream_entry(*factors) for factors in _STREAMS]
    dtypes = (torch.float16, torch.float32)
    tensor = [_tensor_entry(dtype, *factors) for dtype in dtypes for factors in _TENSOR]
    return (*rows, *(f"hadamard_small<{pair}>" for pair in pairs), *streams, *tensor)


ENTRIES = _entries()
