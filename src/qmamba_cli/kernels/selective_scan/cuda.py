"""Selective scan on an NVIDIA GPU; `reference` is the definition, selective_scan.cu has the kernels."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import contiguous, launch, require_cuda, sm_count
from qmamba_cli.kernels.selective_scan.reference import (
    CHUNK,
    FLOAT_DTYPES,
    ScanResult,
    check_operands,
    check_scales,
    out_dtype,
)
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import Scale, dequantize, reciprocal

SOURCE = "selective_scan/selective_scan.cu"
MAX_STATES = 128
# As the kernels take them.
_ROW_ORDER = ("u", "dt", "z", "B", "C")
# Loop counters are 32-bit and run up to a tile past the end.
_MAX_LENGTH = 2**30

# States a lane and lanes a channel of the walk kernel, by the states they hold; 16 states have two splits.
# More states are walked in float32 only.
_SIXTEEN_STATES = ((8, 2), (4, 4))
_WALK_SPLITS = (*_SIXTEEN_STATES, (8, 4), (8, 8), (8, 16))
_WALK_THREADS = 128
_STEP_THREADS = 128
_STEP_STATES = 4
# Lanes a channel of the lanes kernel; of a block at most 10 warps compute, 2 fetch and store.
_LANES = (8, 16)
_LANES_STATES, _SEGMENT, _PADDED = 16, 16, 20
_LANES_WARPS, _HELPER_WARPS = 10, 2
# In the time that a scheduler needs for one warp and tile: what every tile costs beside that, what every warp
# of the multiprocessor costs by the shared memory it reads, and what a round of the shuffle scan adds.
_TILE_COST, _WARP_COST, _SCAN_COST = 0.6, 0.1, 0.03
# Below this length a tile of the lanes kernel would be mostly padding.
_LANES_MIN_LENGTH = 128
# Channels (b * d) a multiprocessor: up to the first number the lanes kernel fills the GPU better than
# walking, from the second number on two lanes a channel fill it. Between what an H200 (132 multiprocessors)
# showed at 5 120 and 12 288 channels, and at 12 288 and 40 960.
_LANES_MAX_CHANNELS = 60
_TWO_LANES_MIN_CHANNELS = 150

_FLOAT_TYPES = "float, float"
_INT8_TYPES = ("signed char, signed char", "signed char, float")
_HALF_TYPES = ("F16, F16", "BF16, BF16")
_NARROW_TYPES = (*_INT8_TYPES, *_HALF_TYPES)
TYPE_NAMES = {
    torch.int8: "signed char",
    torch.float32: "float",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_TYPE_BYTES = {"signed char": 1, "float": 4, "F16": 2, "BF16": 2}
ENTRIES: tuple[str, ...] = (
    *(f"selective_scan_walk<{_FLOAT_TYPES}, {states}, {lanes}>" for states, lanes in _WALK_SPLITS),
    *(
        f"selective_scan_walk<{types}, {states}, {lanes}>"
        for types in _NARROW_TYPES
        for states, lanes in _SIXTEEN_STATES
    ),
    *(f"selective_scan_lanes<{types}, 8>" for types in (_FLOAT_TYPES, *_NARROW_TYPES)),
    # Of float32 operands 16 segments and their copies would not fit into shared memory.
    *(f"selective_scan_lanes<{types}, 16>" for types in _NARROW_TYPES),
    *(f"selective_scan_step<{types}>" for types in (_FLOAT_TYPES, *_NARROW_TYPES)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a launch depends on.

    Attributes:
        multiprocessors: number of them.
        block_shared_bytes: shared memory that one block may ask for.
        shared_bytes: shared memory of a multiprocessor.
    """

    multiprocessors: int
    block_shared_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """One launch.

    Attributes:
        entry: C++ name expression, one of `ENTRIES`.
        threads: of a block.
        channels: of a block, all of one batch row.
        lanes_per_channel: threads that share a channel.
        shared_bytes: dynamic shared memory of a block.
    """

    entry: str
    threads: int
    channels: int
    lanes_per_channel: int
    shared_bytes: int = 0


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
    """Selective state-space recurrence on the GPU; see `reference.selective_scan`.

    u, dt, z, B and C are read in place where neighbouring channels (states) are adjacent in memory, as in a
    transposed view of a (b, l, d) tensor with any row stride; other layouts are copied. All operands of one
    float dtype, and int8 dt, B, C and z with an int8 or float32 u, are read as they are; of another mixture
    the operands are widened to float32 first. Chunked order runs
    parallel over the sequence where b * d is too small to fill the GPU, and from left to right otherwise;
    sequential order always from left to right. They differ by float32 rounding only, and the same call gives
    the same bits every time.

    Raises:
        ShapeError: a shape, dtype or device is not as in the reference, or n is above 128.
    """
    operands = {"u": u, "dt": dt, "B": B, "C": C, "z": z}
    scales: dict[str, Scale | None] = {"u": u_scale, "dt": dt_scale, "B": b_scale, "C": c_scale, "z": z_scale}
    b, d, l = check_operands(u, dt, A, B, C, z, state, state_scale)
    n = A.shape[1]
    vectors = {"A": A, "D": D, "dt_bias": dt_bias}
    vectors |= {"u_scale": u_scale} if isinstance(u_scale, torch.Tensor) else {}
    _check_kernel_limits(d, l, n, vectors)
    check_scales(operands, scales, requantize_u)
    _check_devices({**operands, **vectors}, state)
    rows = {name: _rows(x) for name, x in _readable(operands, scales, l, n, requantize_u).items()}

    y_dtype = torch.float32 if rows["u"].dtype == torch.int8 else rows["u"].dtype
    y = torch.empty(b, l, d, dtype=y_dtype, device=u.device)
    state_dtype = torch.float32 if state_scale is None else torch.int8
    new_state = torch.empty(b, d, n, dtype=state_dtype, device=u.device)
    chunk_states = (
        torch.empty(b, -(-l // CHUNK), d, n, dtype=torch.float32, device=u.device)
        if return_chunk_states
        else None
    )
    types = f"{TYPE_NAMES[rows['dt'].dtype]}, {TYPE_NAMES[rows['u'].dtype]}"
    config = plan(b, d, l, n, order, types=types, gpu=gpu_of(u.device))
    # The grid of a float u matters only where it is requantized.
    requantized = requantize_u and u.dtype != torch.int8
    # Of u's scales only those of a grid that the kernel meets: int8, or one that it rounds to.
    on_grid = requantized or rows["u"].dtype == torch.int8
    vectors = {name: contiguous(name, x) for name, x in vectors.items() if name != "u_scale" or on_grid}
    blocks = -(-d // config.channels)
    launch(
        SOURCE,
        config.entry,
        grid=(blocks * b, 1, 1),
        block=(config.threads, 1, 1),
        args=[
            *(rows[name] for name in _ROW_ORDER),
            *(vectors.get(name) for name in ("A", "D", "dt_bias", "u_scale")),
            None if state is None else contiguous("state", state),
            new_state,
            chunk_states,
            y,
            *(np.int64(rows[name].stride(axis)) for name in _ROW_ORDER for axis in (0, 1)),
            *_scale_arguments(rows, scales, requantized, state_scale),
            *(np.int32(value) for value in (d, l, n, blocks, config.lanes_per_channel)),
        ],
        shared_bytes=config.shared_bytes,
        device=u.device,
        # Its launch takes as long as its work.
        overlap=l == 1,
    )
    return ScanResult(y=y.to(out_dtype(u)), state=new_state, chunk_states=chunk_states)


def _scale_arguments(
    rows: dict[str, torch.Tensor],
    scales: dict[str, Scale | None],
    requantized: bool,
    state_scale: float | None,
) -> list[np.float32]:
    """The kernels' scales in order; an inverse scale of zero says that nothing is rounded."""
    steps = {name: scales[name] if x.dtype == torch.int8 else 1.0 for name, x in rows.items()}
    u_step = scales["u"] if requantized else steps["u"]
    # One a channel is passed as a tensor.
    u_number = 1.0 if isinstance(u_step, torch.Tensor) else u_step or 0.0
    u_inverse = reciprocal(u_number) if requantized else 0.0
    state_steps = (1.0, 0.0) if state_scale is None else (state_scale, reciprocal(state_scale))
    return [
        np.float32(x)
        for x in (u_number, u_inverse, steps["dt"], steps["B"], steps["C"], steps["z"], *state_steps)
    ]


def plan(b: int, d: int, l: int, n: int, order: ScanOrder, *, types: str, gpu: Gpu) -> LaunchConfig:
    """The kernel and its shape for one call.

    Args:
        b: batch rows.
        d: channels.
        l: time steps.
        n: states, at most `MAX_STATES`, or 16 of other types than float where l > 1.
        order: only chunked order may run parallel over the sequence.
        types: C++ types of dt, B, C, z and of u.
        gpu: where it runs.
    """
    if l == 1:
        lanes = _power_of_two(-(-n // _STEP_STATES))
        return LaunchConfig(
            entry=f"selective_scan_step<{types}>",
            threads=_STEP_THREADS,
            channels=_STEP_THREADS // lanes,
            lanes_per_channel=lanes,
        )
    few = b * d <= _LANES_MAX_CHANNELS * gpu.multiprocessors
    if order is ScanOrder.CHUNKED and few and n <= _LANES_STATES and l >= _LANES_MIN_LENGTH:
        config = _plan_lanes(b, d, l, types, gpu)
        if config is not None:
            return config
    wide = b * d >= _TWO_LANES_MIN_CHANNELS * gpu.multiprocessors
    splits = _WALK_SPLITS if types == _FLOAT_TYPES else _SIXTEEN_STATES
    fitting = [split for split in splits if split[0] * split[1] >= n]
    size = fitting[0][0] * fitting[0][1]
    # Where a size has two splits, the first has fewer lanes a channel.
    states, lanes = [split for split in fitting if split[0] * split[1] == size][0 if wide else -1]
    return LaunchConfig(
        entry=f"selective_scan_walk<{types}, {states}, {lanes}>",
        threads=_WALK_THREADS,
        channels=_WALK_THREADS // lanes,
        lanes_per_channel=lanes,
    )


def _plan_lanes(b: int, d: int, l: int, types: str, gpu: Gpu) -> LaunchConfig | None:
    """The block of the lanes kernel that leaves the busiest scheduler the least to do, if any fits."""
    best, best_cost = None, float("inf")
    for lanes in _LANES:
        shared = lanes_shared_bytes(lanes, types)
        if shared > gpu.block_shared_bytes or f"selective_scan_lanes<{types}, {lanes}>" not in ENTRIES:
            continue
        for warps in range(_LANES_WARPS, 0, -1):
            channels = warps * 32 // lanes
            # A block fills a multiprocessor; its warps are dealt out to 4 schedulers.
            waves = -(-b * -(-d // channels) // gpu.multiprocessors)
            tiles = -(-l // (lanes * _SEGMENT))
            # Whole rows of 4 channels are copied without a look at each.
            copies = 1.0 if channels % 4 == 0 else 1.2
            work = -(-warps // 4) * (1 + _SCAN_COST * lanes.bit_length()) + _WARP_COST * warps + _TILE_COST
            cost = waves * tiles * work * copies
            if cost < best_cost:
                best_cost = cost
                best = LaunchConfig(
                    entry=f"selective_scan_lanes<{types}, {lanes}>",
                    threads=(warps + _HELPER_WARPS) * 32,
                    channels=channels,
                    lanes_per_channel=lanes,
                    shared_bytes=shared,
                )
    return best


def lanes_shared_bytes(lanes: int, types: str) -> int:
    """Shared memory of one block of the lanes kernel, laid out as selective_scan_lanes.cuh says.

    Args:
        lanes: a channel.
        types: C++ types of dt, B, C, z and of u.
    """
    operand, u_operand = types.split(", ")
    pitch = _LANES_WARPS * 32 // lanes

    def tile(name: str) -> int:
        size = _TYPE_BYTES[name]
        return lanes * (_SEGMENT * pitch * size + max(128 // lanes, 4 * size))

    states = 2 * _LANES_STATES * 4 * (lanes * _PADDED + 4)
    y = lanes * 4 * (_SEGMENT * pitch + 4)
    raw_states = 2 * _LANES_STATES * lanes * _SEGMENT * _TYPE_BYTES[operand]
    gates = 1024 if operand == "signed char" else 0
    carries = 2 * pitch * _LANES_STATES * 4
    return 2 * (states + y + 2 * tile(operand) + tile(u_operand)) + carries + raw_states + gates


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


@cache
def gpu_of(device: torch.device) -> Gpu:
    """What `plan` needs to know of a device."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        multiprocessors=sm_count(device),
        # Missing where the hardware has no such choice.
        block_shared_bytes=int(
            getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        ),
        shared_bytes=int(properties.shared_memory_per_multiprocessor),
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(b, c, l) to a (b, l, c) view whose channels are adjacent; a copy where they are not."""
    rows = x.transpose(1, 2)
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def _readable(
    operands: dict[str, torch.Tensor],
    scales: dict[str, Scale | None],
    l: int,
    n: int,
    requantize_u: bool,
) -> dict[str, torch.Tensor]:
    """The operands in dtypes that a kernel exists for: unchanged where possible, else as float32.

    More than 16 states, and a half-precision u to put on its grid, are rare enough for float32, which keeps
    the instances few.
    """
    u_dtype, others = operands["u"].dtype, {x.dtype for name, x in operands.items() if name != "u"}
    half = u_dtype in FLOAT_DTYPES[1:]
    if (l == 1 or n <= _LANES_STATES) and not (half and requantize_u):
        if others == {u_dtype}:
            return operands
        if others == {torch.int8}:
            return {**operands, "u": operands["u"].float()}
    return {name: _widened(x, scales[name]) for name, x in operands.items()}


def _widened(x: torch.Tensor, scale: Scale | None) -> torch.Tensor:
    return x.float() if x.dtype != torch.int8 or scale is None else dequantize(x, scale)


def _check_kernel_limits(d: int, l: int, n: int, parameters: dict[str, torch.Tensor]) -> None:
    if n > MAX_STATES:
        raise ShapeError(f"selective_scan: `n` must be at most {MAX_STATES} on a GPU, got {n}")
    if max(d, l) > _MAX_LENGTH:
        raise ShapeError(f"selective_scan: `d` and `l` must be at most {_MAX_LENGTH}, got {d} and {l}")
    for name, x in parameters.items():
        shape = (d, n) if name == "A" else (d,)
        if x.shape != shape or x.dtype != torch.float32:
            raise ShapeError(
                f"selective_scan: `{name}` must be {shape} float32, got {tuple(x.shape)} {x.dtype}"
            )


def _check_devices(tensors: dict[str, torch.Tensor], state: torch.Tensor | None) -> None:
    device = tensors["u"].device
    for name, x in {**tensors, **({} if state is None else {"state": state})}.items():
        require_cuda(name, x)
        if x.device != device:
            raise ShapeError(f"selective_scan: `{name}` is on {x.device}, expected {device} as `u`")
