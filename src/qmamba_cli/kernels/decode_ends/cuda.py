"""A step's two ends on CUDA: one launch from tokens to the residual, and one from the residual to a token."""

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.decode.cuda import shared_memory
from qmamba_cli.kernels.hadamard.cuda import core_arguments, segment_stride
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for
from qmamba_cli.kernels.rms_norm.cuda import launch_shape

SOURCE = "decode_ends/decode_ends.cu"
_TYPES = {torch.int8: "signed char", torch.float16: "F16", torch.bfloat16: "BF16"}
# The core of a power of two: that of `unrotate`, and the matrix of this order that `hadamard` begins with.
_NO_CORE, _SYLVESTER_CORE = 1, 16
_CORES = (_NO_CORE, 12, 20, 28)
_WIDTH_UNIT, _MAX_WIDTH, _LEAST_BITS, _MAX_COLUMN = 128, 4096, 5, 32
_COLUMN_BITS = 7
_ALIGNMENT = 16
_WARP = 32
_THREADS = 256
# As in the kernel: warps of a block of the head, rows of the weight a warp, its slots, their bytes of a row.
_HEAD_WARPS, _HEAD_ROWS, _HEAD_SLOTS, _SLOT_BYTES = 16, 4, 3, 512
_HALF_SHARED_BYTES = 115 * 1024


def _begin_entry(dtype: torch.dtype, core: int) -> str:
    return f"ends_begin<{_TYPES[dtype]}, {core_arguments(_SYLVESTER_CORE if core == _NO_CORE else core)}>"


def _turn_entry(core: int) -> str:
    return f"ends_turn<{core}>"


def _head_entry(dtype: torch.dtype, core: int) -> str:
    return f"ends_head<{_TYPES[dtype]}, {core}>"


ENTRIES: tuple[str, ...] = (
    *(_begin_entry(dtype, core) for dtype in _TYPES for core in _CORES),
    *(_turn_entry(core) for core in _CORES),
    *(_head_entry(dtype, core) for dtype in _TYPES for core in _CORES),
)


def supported(table: torch.Tensor, head: torch.Tensor, gain: torch.Tensor | None) -> bool:
    """Whether there are kernels for an embedding and a head, (vocab_size, d_model) each, and the last norm.

    They take widths and dtypes of models, dense tensors on 16-byte boundaries, and GPUs that lend one thread
    block more than half of Hopper's shared memory.
    """
    width = table.shape[1]
    plan = plan_for(width)
    bits = _bits(width, plan.core)
    tensors = [tensor for tensor in (table, head, gain) if tensor is not None]
    return (
        plan.is_full
        and plan.core in _CORES
        and width % _WIDTH_UNIT == 0
        and width <= _MAX_WIDTH
        and bits >= _LEAST_BITS
        and plan.core << max(0, bits - _COLUMN_BITS) <= _MAX_COLUMN
        and table.dtype in _TYPES
        and head.dtype in _TYPES
        and all(tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)
        and _head_bytes(width, head.element_size(), gain) <= shared_memory(head.device).block
    )


def begin(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`hadamard(embedding(ids, table, scale))` of a `supported` table, the same bits.

    Args:
        ids: (b,) int64; one outside the table gives a row of NaN.
        table: (vocab_size, d_model) int8 with ``scale``, float16 or bfloat16; contiguous.
        scale: (vocab_size,) float32, or None.

    Returns:
        (b, d_model) float32.
    """
    width = table.shape[1]
    plan = plan_for(width)
    core = _SYLVESTER_CORE if plan.core == _NO_CORE else plan.core
    bits = _bits(width, core)
    stride = segment_stride(bits)
    residual = torch.empty(ids.numel(), width, device=table.device)
    _launch.launch(
        SOURCE,
        _begin_entry(table.dtype, plan.core),
        grid=(ids.numel(), 1, 1),
        block=(_THREADS, 1, 1),
        args=(
            ids,
            table,
            scale,
            residual,
            np.int32(table.shape[0]),
            np.int32(bits),
            np.int32(stride),
            _norm(width),
        ),
        device=table.device,
        shared_bytes=4 * (width + core * stride),
    )
    return residual


def turn(residual: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`unrotate(rms_norm(residual, None, eps), gain)` of a `supported` width, the same bits.

    Args:
        residual: (b, d_model) float32, contiguous, on 16-byte boundaries.
        gain: (d_model,) float32 likewise, or None.
        eps: of the norm.

    Returns:
        (b, d_model) float32.
    """
    tokens, width = residual.shape
    hidden = torch.empty_like(residual)
    _launch.launch(
        SOURCE,
        _turn_entry(plan_for(width).core),
        grid=(tokens, 1, 1),
        block=(_THREADS, 1, 1),
        args=(residual, gain, _core(width, residual.device), hidden, *_norm_args(width, eps)),
        device=residual.device,
        shared_bytes=_turn_bytes(width, gain),
        overlap=True,
    )
    return hidden


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """A `supported` head for one row at a time: norm, way back to the tables' basis, product, and the choice.

    Calls must not overlap: they share a word that collects the largest logit.

    Attributes:
        gain: (d_model,) float32, the last norm's weight, or None.
        weight: (vocab_size, d_model) int8, float16 or bfloat16; contiguous.
        weight_scale: (vocab_size,) float32, or None.
        bias: (vocab_size,) float32, or None.
        eps: of the norm.
    """

    gain: torch.Tensor | None
    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    _found: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        found = torch.zeros(2, dtype=torch.int64, device=self.weight.device)
        object.__setattr__(self, "_found", found)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """`linear(turn(residual, gain, eps), weight, bias, weight_scale)`, the same bits.

        Args:
            residual: (1, d_model) float32, contiguous, on 16-byte boundaries.

        Returns:
            (1, vocab_size) float32.
        """
        logits = torch.empty(1, self.weight.shape[0], device=residual.device)
        self._launch(residual, logits, None, self.weight.shape[0])
        return logits

    def choose(self, residual: torch.Tensor, token: torch.Tensor, vocab_size: int | None = None) -> None:
        """Write `argmax` of the logits below ``vocab_size`` into ``token``, of one int64."""
        rows = self.weight.shape[0]
        self._launch(residual, None, token, rows if vocab_size is None else min(vocab_size, rows))

    def _launch(
        self, residual: torch.Tensor, logits: torch.Tensor | None, token: torch.Tensor | None, limit: int
    ) -> None:
        rows, width = self.weight.shape
        itemsize, blocks = self.weight.element_size(), -(-rows // (_HEAD_ROWS * _HEAD_WARPS))
        _launch.launch(
            SOURCE,
            _head_entry(self.weight.dtype, plan_for(width).core),
            grid=(min(blocks, _launch.sm_count(self.weight.device)), 1, 1),
            block=(_HEAD_WARPS * _WARP, 1, 1),
            args=(
                residual,
                self.gain,
                _core(width, self.weight.device),
                self.weight,
                self.weight_scale,
                self.bias,
                logits,
                self._found,
                token,
                np.int32(rows),
                np.int32(limit),
                *_norm_args(width, self.eps),
            ),
            device=self.weight.device,
            shared_bytes=_head_bytes(width, itemsize, self.gain),
            overlap=True,
        )


def _bits(width: int, core: int) -> int:
    return (width // core).bit_length() - 1


def _norm(width: int) -> np.float32:
    return np.float32(1.0 / math.sqrt(width))


def _norm_args(width: int, eps: float) -> tuple[np.int32 | np.float32, ...]:
    """The parameters from d to norm, in the kernels' order."""
    bits = _bits(width, plan_for(width).core)
    return np.int32(width), np.int32(bits), np.int32(launch_shape(width)[1]), np.float32(eps), _norm(width)


@cache
def _core(width: int, device: torch.device) -> torch.Tensor | None:
    """The transpose of the width's core, or None where it has none."""
    order = plan_for(width).core
    return None if order == _NO_CORE else core_matrix(order).t().contiguous().to(device, torch.float32)


def _turn_bytes(width: int, gain: torch.Tensor | None) -> int:
    """Shared memory for a row, the gain, the core, and the warps' sums of squares."""
    core = plan_for(width).core
    return 4 * (width * (1 if gain is None else 2) + (core**2 if core > _NO_CORE else 0) + _THREADS // _WARP)


def _head_bytes(width: int, itemsize: int, gain: torch.Tensor | None) -> int:
    span = _SLOT_BYTES // itemsize
    held, slots = 4 * -(-width // span) * span, _HEAD_WARPS * _HEAD_SLOTS * _HEAD_ROWS * _SLOT_BYTES
    # More than half of a multiprocessor's: two blocks on one would leave others idle.
    return max(held + slots + 8 * _HEAD_WARPS + _turn_bytes(width, gain), _HALF_SHARED_BYTES)
