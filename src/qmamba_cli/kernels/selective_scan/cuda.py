"""Selective scan on an NVIDIA GPU; `reference` is the definition, selective_scan.cu has the kernels."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import contiguous, launch, require_cuda, sm_count
from qmamba_cli.kernels.selective_scan.reference import CHUNK, ScanResult, check_operands
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import dequantize, reciprocal

SOURCE = "selective_scan/selective_scan.cu"
MAX_STATES = 128
# As the kernels take them.
_ROW_ORDER = ("u", "dt", "z", "B", "C")
# Loop counters are 32-bit and run up to a tile past the end.
_MAX_LENGTH = 2**30

# States a lane and lanes a channel of the walk kernel, by the states they hold; 16 states have two splits.
_WALK_SPLITS = ((4, 2), (8, 2), (4, 4), (8, 4), (8, 8), (8, 16))
_WALK_THREADS = 128
_STEP_THREADS = 128
_STEP_STATES = 4
# Of the lanes kernel: lanes a channel, most warps a block, blocks a multiprocessor that its registers allow.
_LANES_SHAPES = ((16, 10, 2), (32, 12, 1))
_LANES_STATES, _SEGMENT, _PADDED = 16, 16, 20
# Below this length a tile of the lanes kernel would be mostly padding.
_LANES_MIN_LENGTH = 128
# Channels (b * d) a multiprocessor: up to the first number the lanes kernel fills the GPU better than
# walking, from the second number on two lanes a channel fill it. Between what an H200 (132 multiprocessors)
# showed at 5 120 and 12 288 channels, and at 12 288 and 40 960.
_LANES_MAX_CHANNELS = 60
_TWO_LANES_MIN_CHANNELS = 150
# Warps of a multiprocessor that keep its exp unit busy.
_BUSY_WARPS = 16

_TYPES = ("signed char, signed char", "signed char, float", "float, float")
ENTRIES: tuple[str, ...] = (
    *(f"selective_scan_walk<{types}, {s}, {lanes}>" for types in _TYPES for s, lanes in _WALK_SPLITS),
    *(f"selective_scan_lanes<{types}, {lanes}>" for types in _TYPES for lanes, _, _ in _LANES_SHAPES),
    *(f"selective_scan_step<{types}>" for types in _TYPES),
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
    u_scale: float | None = None,
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
    transposed view of a (b, l, d) tensor with any row stride; other layouts are copied. dt, B, C and z are
    fast as all int8 or all float32; of a mixture the int8 ones are dequantized first. Chunked order runs
    parallel over the sequence where b * d is too small to fill the GPU, and from left to right otherwise;
    sequential order always from left to right. They differ by float32 rounding only, and the same call gives
    the same bits every time.

    Raises:
        ShapeError: a shape, dtype or device is not as in the reference, or n is above 128.
    """
    operands = {"u": u, "dt": dt, "B": B, "C": C, "z": z}
    scales = {"u": u_scale, "dt": dt_scale, "B": b_scale, "C": c_scale, "z": z_scale}
    b, d, l = check_operands(u, dt, A, B, C, z, state, state_scale)
    n = A.shape[1]
    _check_kernel_limits(d, l, n, {"A": A, "D": D, "dt_bias": dt_bias})
    _check_operands(operands, scales, requantize_u)
    _check_devices({**operands, "A": A, "D": D, "dt_bias": dt_bias}, state)
    if any(operands[name].dtype != torch.int8 for name in ("dt", "B", "C", "z")):
        operands = {name: _dequantized(x, scales[name]) for name, x in operands.items()}
    rows = {name: _rows(x) for name, x in operands.items()}

    y = torch.empty(b, l, d, dtype=torch.float32, device=u.device)
    state_dtype = torch.float32 if state_scale is None else torch.int8
    new_state = torch.empty(b, d, n, dtype=state_dtype, device=u.device)
    chunk_states = (
        torch.empty(b, -(-l // CHUNK), d, n, dtype=torch.float32, device=u.device)
        if return_chunk_states
        else None
    )
    config = plan(b, d, l, n, order, types=_types(rows["u"], rows["dt"]), gpu=_gpu(u.device))
    blocks = -(-d // config.channels)
    # The grid of a float u matters only where it is requantized.
    requantized = requantize_u and u.dtype != torch.int8
    parameters = (contiguous(name, x) for name, x in (("A", A), ("D", D), ("dt_bias", dt_bias)))
    launch(
        SOURCE,
        config.entry,
        grid=(blocks * b, 1, 1),
        block=(config.threads, 1, 1),
        args=[
            *(rows[name] for name in _ROW_ORDER),
            *parameters,
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
    )
    return ScanResult(y=y, state=new_state, chunk_states=chunk_states)


def _scale_arguments(
    rows: dict[str, torch.Tensor],
    scales: dict[str, float | None],
    requantized: bool,
    state_scale: float | None,
) -> list[np.float32]:
    """The kernels' scales in order; an inverse scale of zero says that nothing is rounded."""
    steps = {name: scales[name] if x.dtype == torch.int8 else 1.0 for name, x in rows.items()}
    u_step, u_inverse = (scales["u"], reciprocal(scales["u"] or 0.0)) if requantized else (steps["u"], 0.0)
    state_steps = (1.0, 0.0) if state_scale is None else (state_scale, reciprocal(state_scale))
    return [
        np.float32(x)
        for x in (u_step, u_inverse, steps["dt"], steps["B"], steps["C"], steps["z"], *state_steps)
    ]


def plan(b: int, d: int, l: int, n: int, order: ScanOrder, *, types: str, gpu: Gpu) -> LaunchConfig:
    """The kernel and its shape for one call.

    Args:
        b: batch rows.
        d: channels.
        l: time steps.
        n: states, at most `MAX_STATES`.
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
    fitting = [split for split in _WALK_SPLITS if split[0] * split[1] >= n]
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
    """The block of the lanes kernel that leaves the busiest multiprocessor the least to do, if any fits."""
    best, best_cost = None, float("inf")
    for lanes, most_warps, resident in _LANES_SHAPES:
        for warps in range(most_warps, 1, -1):
            channels = warps * 32 // lanes
            shared = lanes_shared_bytes(lanes, channels, types)
            if shared > gpu.block_shared_bytes:
                continue
            # A block also costs 1 KB that the driver keeps.
            resident_here = min(resident, gpu.shared_bytes // (shared + 1024))
            load = -(-b * -(-d // channels) // gpu.multiprocessors)
            busy = min(1.0, min(load, resident_here) * warps / _BUSY_WARPS)
            cost = load * warps * -(-l // (lanes * _SEGMENT)) / busy
            if cost < best_cost:
                best_cost = cost
                best = LaunchConfig(
                    entry=f"selective_scan_lanes<{types}, {lanes}>",
                    threads=warps * 32,
                    channels=channels,
                    lanes_per_channel=lanes,
                    shared_bytes=shared,
                )
    return best


def lanes_shared_bytes(lanes: int, channels: int, types: str) -> int:
    """Shared memory of one block of the lanes kernel, laid out as selective_scan_lanes says.

    Args:
        lanes: a channel.
        channels: a block.
        types: C++ types of dt, B, C, z and of u.
    """
    float_row = 4 * (lanes * _PADDED + 4)
    byte_row = lanes * _SEGMENT + 16
    row = {"signed char": byte_row, "float": float_row}
    operand, u_operand = types.split(", ")
    rows_and_states = float_row * (2 * _LANES_STATES + channels) + channels * 2 * _LANES_STATES * 4
    return rows_and_states + channels * (2 * row[operand] + row[u_operand])


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


@cache
def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        multiprocessors=sm_count(device),
        # Missing where the hardware has no such choice.
        block_shared_bytes=int(
            getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        ),
        shared_bytes=int(properties.shared_memory_per_multiprocessor),
    )


def _types(u: torch.Tensor, dt: torch.Tensor) -> str:
    name = {torch.int8: "signed char", torch.float32: "float"}
    return f"{name[dt.dtype]}, {name[u.dtype]}"


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(b, c, l) to a (b, l, c) view whose channels are adjacent; a copy where they are not."""
    rows = x.transpose(1, 2)
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def _dequantized(x: torch.Tensor, scale: float | None) -> torch.Tensor:
    return x if x.dtype != torch.int8 or scale is None else dequantize(x, scale)


def _check_operands(
    operands: dict[str, torch.Tensor], scales: dict[str, float | None], requantize_u: bool
) -> None:
    for name, x in operands.items():
        if x.dtype not in (torch.int8, torch.float32):
            raise ShapeError(f"selective_scan: `{name}` is {x.dtype}, expected int8 or float32")
        if x.dtype == torch.int8 and scales[name] is None:
            raise ShapeError(f"selective_scan: `{name}` is int8 and needs `{name.lower()}_scale`")
    if requantize_u and operands["u"].dtype != torch.int8 and scales["u"] is None:
        raise ShapeError("selective_scan: requantizing `u` needs `u_scale`")


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
