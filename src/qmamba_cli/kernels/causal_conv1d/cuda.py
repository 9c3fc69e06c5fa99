"""Causal depthwise convolution + SiLU on CUDA; `reference` is the definition."""

from dataclasses import dataclass

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import Arg, contiguous, launch, require_cuda, sm_count
from qmamba_cli.kernels.causal_conv1d.reference import HALVES, ConvState, check_operands
from qmamba_cli.kernels.quantize.cuda import quantize
from qmamba_cli.quant.grid import CHANNEL_SCALES, Scale, reciprocal

SOURCE = "causal_conv1d/causal_conv1d.cu"
_C_NAMES = {torch.int8: "signed char", torch.float32: "float", torch.float16: "F16", torch.bfloat16: "BF16"}
_REAL_PAIRS = ("signed char, float", "float, float", "F16, F16", "BF16, BF16")
_BOOLS = ("false", "true")

ENTRIES = (
    *(f"causal_conv1d_static<{out}>" for out in ("signed char", "float")),
    *(f"causal_conv1d_static_channels<signed char, {quads}, {each}>" for quads in (1, 2) for each in _BOOLS),
    "causal_conv1d_static_channels<float, 1, false>",
    *(f"causal_conv1d_static_channels<float, 1, {each}, true>" for each in _BOOLS),
    *(f"causal_conv1d_real_channels<signed char, float, {each}, true>" for each in _BOOLS),
    *(f"causal_conv1d_real{layout}<{pair}>" for layout in ("", "_channels") for pair in _REAL_PAIRS),
)

_THREADS = 128
# Resident blocks of a multiprocessor; the kernels' launch bounds allow at least 4.
_BLOCKS_PER_SM = 8
# Threads side by side along the contiguous axis.
_MOST_PIECES = 64
_MOST_QUADS = 32
_MOST_ROWS = 16
_MOST_STEPS = 32
# Runs of eight channels: their lengths, and what the start of one costs in steps.
_WIDE_SPANS = range(8, 65, 4)
_START_STEPS = 4
# Runs of four channels of anything but int8 with one scale: their lengths, and the blocks that fit.
_REAL_SPANS = range(4, 65, 4)
_REAL_BLOCKS_PER_SM = 4
# Shorter sequences are not worth eight channels a thread.
_WIDE_MIN_STEPS = 64
_MAX_GRID_Y = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How one call is cut.

    Attributes:
        grid: blocks.
        block: threads.
        span: rows or pairs of rows (time contiguous) or steps (channels contiguous) that one thread walks.
        quads: groups of four channels a thread (channels contiguous).
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    span: int
    quads: int = 1


def time_config(b: int, rows: int, l: int, *, steps: int, multiprocessors: int) -> LaunchConfig:
    """The cut for contiguous time: ``steps`` steps a thread, of as many rows as give the fewest waves.

    A row is a channel, or two of int8 with one scale.
    """
    pieces = _ceil(l, steps)
    x = min(_MOST_PIECES, _power_of_two(pieces))
    y = _THREADS // x
    along = _ceil(pieces, x)
    resident = multiprocessors * _BLOCKS_PER_SM

    def cost(span: int) -> int:
        # Each block also pays about one row for its start.
        return _ceil(_ceil(rows, y * span) * along * b, resident) * (span + 1)

    span = min(range(1, _MOST_ROWS + 1), key=cost)
    return LaunchConfig(grid=(_ceil(rows, y * span), along, b), block=(x, y, 1), span=span)


def channels_config(b: int, d: int, l: int, *, multiprocessors: int) -> LaunchConfig:
    """The cut for contiguous channels: the longest runs, up to a limit, that fill half of the device."""
    quads = _ceil(d, 4)
    x = min(_MOST_QUADS, _power_of_two(quads))
    y = _THREADS // x
    wanted = multiprocessors * _BLOCKS_PER_SM * _THREADS // 2
    span = _MOST_STEPS
    while span > 4 and b * quads * _ceil(l, span) < wanted:
        span //= 2
    while _ceil(l, span * y) > _MAX_GRID_Y:
        span *= 2
    return LaunchConfig(grid=(_ceil(quads, x), _ceil(l, span * y), b), block=(x, y, 1), span=span)


def real_config(b: int, d: int, l: int, *, multiprocessors: int) -> LaunchConfig:
    """The cut for contiguous channels of floats, or of int8 with a scale a token: runs of even load."""
    quads = _ceil(d, 4)
    x = min(_MOST_QUADS, _power_of_two(quads))
    y = _THREADS // x
    columns = _ceil(quads, x)

    def cost(steps: int) -> int:
        waves = _ceil(columns * _ceil(l, steps * y) * b, multiprocessors * _REAL_BLOCKS_PER_SM)
        return waves * (steps + _START_STEPS)

    span = min(_REAL_SPANS, key=cost)
    while _ceil(l, span * y) > _MAX_GRID_Y:
        span *= 2
    return LaunchConfig(grid=(columns, _ceil(l, span * y), b), block=(x, y, 1), span=span)


def wide_config(b: int, d: int, l: int, *, multiprocessors: int, span: int | None = None) -> LaunchConfig:
    """The cut for contiguous channels, eight a thread: runs that load the multiprocessors evenly."""
    columns = _ceil(_ceil(d, 8), _MOST_QUADS)
    y = _THREADS // _MOST_QUADS

    def cost(steps: int) -> int:
        return _ceil(columns * _ceil(l, steps * y) * b, multiprocessors) * (steps + _START_STEPS)

    steps = span or min(_WIDE_SPANS, key=cost)
    while _ceil(l, steps * y) > _MAX_GRID_Y:
        steps *= 2
    return LaunchConfig(
        grid=(columns, _ceil(l, steps * y), b), block=(_MOST_QUADS, y, 1), span=steps, quads=2
    )


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    x_scale: float | torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out_scale: Scale | None = None,
    state: ConvState | None = None,
) -> tuple[torch.Tensor, ConvState]:
    """Depthwise causal convolution, then SiLU; see `reference.causal_conv1d`.

    x may have contiguous time or contiguous channels and any stride along the other; both run without a copy,
    and out gets the same axis contiguous, dense. Any other x is copied. Outputs in int8 are of class grid,
    float ones of class real; a float output depends on its own window only (and that of its neighbour
    channel, where both share a reciprocal), not on layout or split.

    Raises:
        ShapeError: as the reference, or a tensor is on another device.
    """
    check_operands(x, weight, x_scale, weight_scale, state)
    if out_scale is None:
        return convolve(x, weight, bias, x_scale, weight_scale, None, state)
    static = x_scale is not None and not isinstance(x_scale, torch.Tensor)
    if static and _fused(out_scale):
        return convolve(x, weight, bias, x_scale, weight_scale, out_scale, state)
    if x.dtype not in HALVES:
        v, last = convolve(x, weight, bias, x_scale, weight_scale, None, state)
        return quantize(v, out_scale), last
    # Widened, so that v is rounded once; that is exact, and so is the way back of the state.
    held = None if state is None else ConvState(state.values.float())
    v, last = convolve(x.float(), weight, bias, None, None, None, held)
    return quantize(v, out_scale), ConvState(last.values.to(x.dtype))


def causal_conv1d_both(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    x_scale: float | torch.Tensor,
    weight_scale: torch.Tensor,
    out_scale: Scale,
    state: ConvState | None = None,
) -> tuple[torch.Tensor, torch.Tensor, ConvState]:
    """The float output and its int8 codes; see `reference.causal_conv1d_both`.

    Where channels are contiguous both are written by one kernel; else v is quantized in a second pass.

    Raises:
        ShapeError: as `causal_conv1d`.
    """
    check_operands(x, weight, x_scale, weight_scale, state)
    x, channels = _layout(require_cuda("x", x))
    if not (channels and _fused(out_scale)):
        v, last = convolve(x, weight, bias, x_scale, weight_scale, None, state)
        return v, quantize(v, out_scale), last
    b, d, l = x.shape
    codes = torch.empty(b, l, d, dtype=torch.int8, device=x.device).transpose(1, 2)
    v, last = convolve(x, weight, bias, x_scale, weight_scale, out_scale, state, codes=codes)
    return v, codes, last


def _fused(out_scale: Scale) -> bool:
    """Whether the kernels may round in their last fma; scales a channel are in these limits by contract."""
    if isinstance(out_scale, torch.Tensor):
        return True
    reciprocal(out_scale)
    return CHANNEL_SCALES[0] <= out_scale <= CHANNEL_SCALES[1]


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: float | torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    out_scale: Scale | None,
    state: ConvState | None,
    *,
    config: LaunchConfig | None = None,
    codes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ConvState]:
    """One launch for checked operands; benchmarks name the ``config`` themselves, which must fit x's layout.

    With ``codes``, (b, d, l) int8 with dense channels as x has them, the output is float32 and they its int8.

    Raises:
        ShapeError: a tensor is on another device.
    """
    device = require_cuda("x", x).device
    x, channels = _layout(x)
    (b, d, l), w = x.shape, weight.shape[1]
    real = torch.float32 if x.dtype == torch.int8 else x.dtype
    out_dtype = real if out_scale is None or codes is not None else torch.int8
    per_token = x_scale if isinstance(x_scale, torch.Tensor) else None
    out, new_state = _outputs(x, channels, out_dtype, w, per_token is not None)
    if b == 0 or d == 0:
        return out, new_state

    static = x_scale is not None and per_token is None
    config = config or _config(x, channels, static, out_dtype)
    access = 4 * config.quads if channels else _steps(static, out_dtype)
    stride = x.stride(2 if channels else 1)
    of_channels, number = (out_scale, None) if isinstance(out_scale, torch.Tensor) else (None, out_scale)
    near = stride * x.element_size() < 2**32  # all that the kernels' row addresses hold
    args: list[Arg] = [
        x,
        _words("weight", weight if x.dtype == torch.int8 else weight.float(), device),
        _vector("weight_scale", weight_scale, (d,), device),
        _vector("bias", bias, (d,), device),
        None if state is None else _on(device, "state", contiguous("state", state.values)),
        out,
        new_state.values,
        np.int32(d),
        np.int32(l),
        np.int32(w),
        np.int64(x.stride(0)),
        np.int64(stride),
        np.int32(config.span),
        np.int32(near and _aligned(x, (x.stride(0) if b > 1 else 0, stride), access)),
        np.int32(_aligned(out, (d if channels else l,), access)),
        np.float32(0.0 if number is None else reciprocal(number)),
    ]
    if static:
        args += [np.float32(x_scale), _vector("out_scale", of_channels, (d,), device)]
    else:
        held = None if state is None or per_token is None else state.scale
        args += [
            _vector("x_scale", per_token, (b, l), device),
            _vector("state.scale", held, (b, w - 1), device),
            new_state.scale,
        ]
        if channels:
            args.append(_vector("out_scale", of_channels, (d,), device))
    if channels:
        args.append(codes)
    entry = _entry(
        x.dtype, out_dtype, channels, static, config.quads, of_channels is not None, codes is not None
    )
    # A step's launch takes as long as its work; this kernel may start early.
    overlap = l == 1 and entry.startswith("causal_conv1d_real_channels")
    launch(SOURCE, entry, grid=config.grid, block=config.block, args=args, device=device, overlap=overlap)
    return out, new_state


def _outputs(
    x: torch.Tensor, channels: bool, dtype: torch.dtype, w: int, per_token: bool
) -> tuple[torch.Tensor, ConvState]:
    """New memory for the output, dense in x's order of axes, and for the state."""
    b, d, l = x.shape
    dense = torch.empty(*((b, l, d) if channels else (b, d, l)), dtype=dtype, device=x.device)
    scale = torch.empty(b, w - 1, device=x.device) if per_token else None
    held = torch.empty(b, d, w - 1, dtype=x.dtype, device=x.device)
    return dense.transpose(1, 2) if channels else dense, ConvState(held, scale)


def _entry(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    channels: bool,
    static: bool,
    quads: int,
    each: bool,
    both: bool,
) -> str:
    layout = "_channels" if channels else ""
    also = f", {_BOOLS[each]}, true" if both else ""
    if not static:
        return f"causal_conv1d_real{layout}<{_C_NAMES[dtype]}, {_C_NAMES[out_dtype]}{also}>"
    arguments = f", {quads}{also or f', {_BOOLS[each]}'}" if channels else ""
    return f"causal_conv1d_static{layout}<{_C_NAMES[out_dtype]}{arguments}>"


def _config(x: torch.Tensor, channels: bool, static: bool, out_dtype: torch.dtype) -> LaunchConfig:
    b, d, l = x.shape
    multiprocessors = sm_count(x.device)
    if not channels:
        rows, steps = _ceil(d, 2) if static else d, _steps(static, out_dtype)
        return time_config(b, rows, l, steps=steps, multiprocessors=multiprocessors)
    if not static:
        return real_config(b, d, l, multiprocessors=multiprocessors)
    wide = out_dtype == torch.int8 and l >= _WIDE_MIN_STEPS and d % 8 == 0
    if wide and x.stride(2) < 2**32 and _aligned(x, (x.stride(0) if b > 1 else 0, x.stride(2)), 8):
        return wide_config(b, d, l, multiprocessors=multiprocessors)
    return channels_config(b, d, l, multiprocessors=multiprocessors)


def _steps(static: bool, out_dtype: torch.dtype) -> int:
    """Steps a thread owns where time is contiguous."""
    return 16 if static and out_dtype == torch.int8 else 4


def _layout(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The tensor itself or a copy, and whether its channels (else its steps) are contiguous."""
    _, d, l = x.shape
    # An axis of size 1 is contiguous whatever its stride; a single step is best read along the channels.
    if d == 1 or x.stride(1) == 1:
        if l == 1 or x.stride(2) != 1:
            return x, True
        return x, False
    if l > 1 and x.stride(2) == 1:
        return x, False
    return x.contiguous(), l == 1


def _aligned(tensor: torch.Tensor, strides: tuple[int, ...], elements: int) -> bool:
    """Whether groups of ``elements``, at most 16 bytes, never straddle; strides are in elements."""
    width = min(16, elements * tensor.element_size())
    starts = (tensor.data_ptr(), *(stride * tensor.element_size() for stride in strides))
    return all(start % width == 0 for start in starts)


def _on(device: torch.device, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device != device:
        raise ShapeError(f"causal_conv1d: `{name}` is on {tensor.device}, expected {device} as `x`")
    return tensor


def _vector(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """A dense float32 tensor of that shape, or None."""
    if tensor is None:
        return None
    if tensor.shape != shape or tensor.dtype != torch.float32:
        raise ShapeError(
            f"causal_conv1d: `{name}` must be {shape} float32, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    return _on(device, name, contiguous(name, tensor))


def _words(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A dense tensor that starts on a word: four int8 taps are read as one."""
    dense = _on(device, name, contiguous(name, tensor))
    return dense if dense.data_ptr() % 4 == 0 else dense.clone()


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()
