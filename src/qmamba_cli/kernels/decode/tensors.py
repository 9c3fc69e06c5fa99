"""What a fused decode step is given: one block's weights, scales and state, and which sizes it can take."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.hadamard.matrix import plan_for
from qmamba_cli.modes import ConvInput, Mode, Precision, ScanReads, ScanU, State
from qmamba_cli.quant.grid import Scale
from qmamba_cli.quant.weights import GroupQuantized, RowQuantized

# Thread blocks of every decode kernel, and the order of the Hadamard factor that joins them.
BLOCKS = 128
MAX_BATCH = 8
_STATES = 16
_MAX_RANK = 256
_MAX_D_MODEL = 4096
_MAX_D_INNER = 8192
_GROUP_MULTIPLE = 32


class DecodeState(NamedTuple):
    """What a block carries from one token to the next; a step updates it in place.

    Attributes:
        conv: last w-1 inputs of the convolution.
        ssm: (b, d, n) scan state, int8 or float32 by the mode.
    """

    conv: ConvState
    ssm: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeColumns:
    """What of a mode shows in one step; the order of the recurrence does not.

    Attributes:
        dynamic_input: the convolution's input has one scale a token, else the calibrated one.
        true_u: the scan reads the convolution's unrounded output, else its int8 grid.
        int8_state: the scan state is int8 between calls, else float32.
    """

    dynamic_input: bool
    true_u: bool
    int8_state: bool

    @classmethod
    def from_mode(cls, mode: Mode) -> "DecodeColumns":
        """The columns of a quantized mode.

        Raises:
            ShapeError: the mode is of float precision, for which there is no fused step.
        """
        if mode.precision is not Precision.INT8:
            raise ShapeError(f"decode: a fused step needs precision=int8, got {mode.precision}")
        return cls(
            dynamic_input=mode.conv_input is ConvInput.DYNAMIC,
            true_u=mode.scan_u is ScanU.TRUE and mode.scan_reads is ScanReads.FP32,
            int8_state=mode.state is State.INT8,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeScales:
    """Activation scales of one block, real units a step; named as the calibrated sites.

    That of u, ``x_proj_input``, is one number or (d,) float32 with one a channel, which the columns of
    x_proj's weight then hold.
    """

    in_proj_input: float
    in_proj_output: float
    x_proj_input: Scale
    x_proj_output: float
    dt_proj_output: float
    ssm_state: float
    out_proj_input: float

    @property
    def x_proj_codes(self) -> float:
        """What a step of x_proj's input counts in its product: u's scale, or 1 where the weight holds it."""
        return 1.0 if isinstance(self.x_proj_input, torch.Tensor) else self.x_proj_input


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockTensors:
    """Weights of one block in the Hadamard basis, the norm's weight folded into in_proj.

    Attributes:
        in_proj: (2d, d_model); the x half first, then z.
        conv: (d, w) int8 taps, newest last, one scale a channel.
        x_proj: (r + 2n, d).
        dt_proj: (d, r).
        out_proj: (d_model, d).
        dt_bias: (d,) float32.
        A: (d, n) float32, negative.
        D: (d,) float32.
        in_bias: (2d,) float32 or None.
        conv_bias: (d,) float32 or None.
        out_bias: (d_model,) float32 or None.
    """

    in_proj: RowQuantized | GroupQuantized
    conv: RowQuantized
    x_proj: RowQuantized
    dt_proj: RowQuantized
    out_proj: RowQuantized | GroupQuantized
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    in_bias: torch.Tensor | None = None
    conv_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None


class Sizes(NamedTuple):
    """Sizes of one block."""

    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int


def supported(
    *,
    d_model: int,
    d_inner: int,
    d_state: int,
    dt_rank: int,
    d_conv: int,
    batch: int = 1,
    group_size: int = 128,
) -> str | None:
    """Why the fused step cannot take these sizes, or None where it can.

    >>> supported(d_model=768, d_inner=1536, d_state=16, dt_rank=48, d_conv=4) is None
    True
    >>> supported(d_model=768, d_inner=1536, d_state=32, dt_rank=48, d_conv=4)
    'd_state is 32, the fused step takes 16'

    Args:
        d_model: width of the residual.
        d_inner: channels.
        d_state: states a channel.
        dt_rank: columns of dt_proj.
        d_conv: taps of the convolution.
        batch: sequences.
        group_size: of the W4 matrices; any where there are none.
    """
    plan = plan_for(d_inner) if d_inner > 0 else None
    rules = (
        (1 <= batch <= MAX_BATCH, f"batch is {batch}, the fused step takes 1 to {MAX_BATCH}"),
        (
            0 < d_model <= _MAX_D_MODEL and d_model % 64 == 0,
            f"d_model is {d_model}, the fused step takes multiples of 64 up to {_MAX_D_MODEL}",
        ),
        (
            0 < d_inner <= _MAX_D_INNER and d_inner % (4 * BLOCKS) == 0,
            f"d_inner is {d_inner}, the fused step takes multiples of {4 * BLOCKS} up to {_MAX_D_INNER}",
        ),
        (
            plan is not None and plan.is_full and plan.order // plan.core % BLOCKS == 0,
            f"d_inner is {d_inner}, whose Hadamard matrix has no Sylvester factor of order {BLOCKS}",
        ),
        (d_state == _STATES, f"d_state is {d_state}, the fused step takes {_STATES}"),
        (0 < dt_rank <= _MAX_RANK, f"dt_rank is {dt_rank}, the fused step takes 1 to {_MAX_RANK}"),
        (2 <= d_conv <= 4, f"d_conv is {d_conv}, the fused step takes 2 to 4"),
        (
            group_size > 0 and group_size % _GROUP_MULTIPLE == 0,
            f"group_size is {group_size}, the fused step takes multiples of {_GROUP_MULTIPLE}",
        ),
    )
    return next((reason for holds, reason in rules if not holds), None)


def check_tensors(tensors: BlockTensors) -> Sizes:
    """Sizes of a block that can be packed.

    Raises:
        ShapeError: a shape or dtype is not as `BlockTensors` documents it, or `supported` refuses it.
    """
    d_model, d = _shape(tensors.out_proj)
    n, rank, taps = tensors.A.shape[-1], _shape(tensors.dt_proj)[1], _shape(tensors.conv)[1]
    for name, got, expected in (
        ("in_proj", _shape(tensors.in_proj), (2 * d, d_model)),
        ("conv", _shape(tensors.conv), (d, taps)),
        ("x_proj", _shape(tensors.x_proj), (rank + 2 * n, d)),
        ("dt_proj", _shape(tensors.dt_proj), (d, rank)),
    ):
        if got != expected:
            raise ShapeError(f"decode: `{name}` is {got}, expected {expected}")
    vectors = {
        "dt_bias": (tensors.dt_bias, (d,)),
        "A": (tensors.A, (d, n)),
        "D": (tensors.D, (d,)),
        "in_bias": (tensors.in_bias, (2 * d,)),
        "conv_bias": (tensors.conv_bias, (d,)),
        "out_bias": (tensors.out_bias, (d_model,)),
    }
    for name, (tensor, shape) in vectors.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise ShapeError(
                f"decode: `{name}` is {tensor.dtype} {tuple(tensor.shape)}, expected float32 {shape}"
            )
    groups = {m.group_size for m in (tensors.in_proj, tensors.out_proj) if isinstance(m, GroupQuantized)}
    for group_size in groups or {BLOCKS}:
        reason = supported(
            d_model=d_model, d_inner=d, d_state=n, dt_rank=rank, d_conv=taps, group_size=group_size
        )
        if reason is not None:
            raise ShapeError(f"decode: {reason}")
    return Sizes(d_model, d, n, rank, taps)


def check_state(
    sizes: Sizes,
    columns: DecodeColumns,
    residual: torch.Tensor,
    state: DecodeState,
    most: int | None = MAX_BATCH,
) -> int:
    """Batch size of a residual and a state that fit a block, at most ``most`` where that is given.

    Raises:
        ShapeError: a shape, dtype or memory order is wrong: everything is updated in place.
    """
    batch, history = residual.shape[0], sizes.d_conv - 1
    wanted = [
        ("residual", residual, (batch, sizes.d_model), torch.float32),
        ("state.conv.values", state.conv.values, (batch, sizes.d_inner, history), torch.int8),
        (
            "state.ssm",
            state.ssm,
            (batch, sizes.d_inner, sizes.d_state),
            torch.int8 if columns.int8_state else torch.float32,
        ),
    ]
    if (state.conv.scale is not None) != columns.dynamic_input:
        raise ShapeError("decode: `state.conv.scale` belongs to a conv input with one scale a token")
    if state.conv.scale is not None:
        wanted.append(("state.conv.scale", state.conv.scale, (batch, history), torch.float32))
    for name, tensor, shape, dtype in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ShapeError(
                f"decode: `{name}` is {tensor.dtype} {tuple(tensor.shape)}, expected a contiguous "
                f"{dtype} {shape}"
            )
    if batch < 1 or (most is not None and batch > most):
        raise ShapeError(f"decode: batch is {batch}, the fused step takes 1 to {most}")
    return batch


def _shape(matrix: RowQuantized | GroupQuantized) -> tuple[int, int]:
    codes = matrix.codes if isinstance(matrix, GroupQuantized) else matrix.qweight
    return int(codes.shape[0]), int(codes.shape[1])
