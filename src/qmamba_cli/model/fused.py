"""The fused decode step of a whole model: a few kernels a layer, with the state in place."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode.pack import PackedBlock, pack_block
from qmamba_cli.kernels.decode.tensors import (
    BlockTensors,
    DecodeColumns,
    DecodeScales,
    DecodeState,
    supported,
)
from qmamba_cli.kernels.linear.interleaved import Interleaved
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.model.ends import BetweenEnds
from qmamba_cli.model.mamba import Mamba, ModelState
from qmamba_cli.model.state import assign
from qmamba_cli.model.weights import BlockWeights, LinearWeights
from qmamba_cli.modes import Precision
from qmamba_cli.quant.packing import unpack_int4
from qmamba_cli.quant.weights import GroupQuantized, RowQuantized

# One layer's step: (b, d_model) float32 residual and state, both updated in place.
FusedBlock: TypeAlias = Callable[[torch.Tensor, DecodeState], None]


class FusedStepper(BetweenEnds):
    """A `decode.Stepper` of fused blocks.

    Args:
        model: embedding, final norm, head and epsilon come from here.
        blocks: one a layer, as `cuda_blocks` makes them.
    """

    def __init__(self, model: Mamba, blocks: Sequence[FusedBlock]) -> None:
        super().__init__(model)
        self._blocks = blocks
        self._state: ModelState | None = None
        self._in_place: Sequence[DecodeState] = ()

    def load(self, state: ModelState) -> None:
        """Take over a state: the first one's tensors become the stepper's own."""
        if self._state is None:
            self._state = state
            self._in_place = [DecodeState(*layer) for layer in state]
        else:
            assign(self._state, state)

    def _run(self, residual: torch.Tensor) -> None:
        for block, state in zip(self._blocks, self._in_place, strict=True):
            block(residual, state)


def unsupported(model: Mamba, batch: int) -> str | None:
    """Why a model has no fused step at this batch size, or None where it has one."""
    if model.mode.precision is not Precision.INT8:
        return f"precision is {model.mode.precision}, the fused step takes int8"
    if model.backend.device.type != "cuda":
        return f"the backend is {model.backend.name}, the fused step takes cuda"
    config, in_proj = model.config, model.weights.blocks[0].in_proj.weight
    if isinstance(in_proj, Interleaved) and not _fits(in_proj.block, DecodeColumns.from_mode(model.mode)):
        return "the weights are packed for another kind of conv input"
    packed = {"group_size": in_proj.group_size} if isinstance(in_proj, PackedInt4) else {}
    return supported(
        d_model=config.d_model,
        d_inner=config.d_inner,
        d_state=config.d_state,
        dt_rank=config.dt_rank,
        d_conv=config.d_conv,
        batch=batch,
        **packed,
    )


def cuda_blocks(model: Mamba, batch: int) -> list[FusedBlock]:
    """The fused blocks of a model on its GPU.

    The packed in_proj and out_proj take the place of the model's own, one block after another, so that the
    model holds each once; it computes the same as before.

    Raises:
        ShapeError: `unsupported` names a reason.
    """
    from qmamba_cli.kernels.decode.cuda import decode_block, plan_beside_others

    packed = packed_blocks(model)
    plan, scratch = plan_beside_others(packed[0], batch)

    def run(layer: int, residual: torch.Tensor, state: DecodeState) -> None:
        after, last = packed[layer - 1] if layer else None, layer == len(packed) - 1
        decode_block(packed[layer], residual, state, scratch, plan=plan, layer=layer, after=after, last=last)

    return [partial(run, layer) for layer in range(len(packed))]


def packed_blocks(model: Mamba) -> list[PackedBlock]:
    """The packed blocks of a model, which are also where its weights are from now on."""
    return [_packed(model, layer) for layer in range(len(model.weights.blocks))]


def _packed(model: Mamba, layer: int) -> PackedBlock:
    """A layer's packed block, which is also where its weights are from now on."""
    weights, columns = model.weights.blocks[layer], DecodeColumns.from_mode(model.mode)
    held = weights.in_proj.weight
    if isinstance(held, Interleaved):
        return replace(held.block, columns=columns)
    packed = pack_block(
        block_tensors(weights), block_scales(weights), columns, norm_eps=model.config.norm_eps
    )
    model.replace_block(layer, interleaved(weights, packed))
    return packed


def interleaved(weights: BlockWeights, packed: PackedBlock) -> BlockWeights:
    """The block with in_proj and out_proj where decoding has them; its other weights are small."""
    return replace(
        weights,
        in_proj=replace(weights.in_proj, weight=Interleaved(block=packed, name="in_proj")),
        out_proj=replace(weights.out_proj, weight=Interleaved(block=packed, name="out_proj")),
    )


def _fits(packed: PackedBlock, columns: DecodeColumns) -> bool:
    """Whether a packed block serves a mode: how the conv's input is quantized is packed with its taps."""
    return packed.columns.dynamic_input == columns.dynamic_input


def block_tensors(weights: BlockWeights) -> BlockTensors:
    """A block's weights as the fused step takes them.

    Raises:
        ShapeError: they are float.
    """
    if weights.conv_scale is None:
        raise ShapeError("a fused step needs quantized weights, got float ones")
    return BlockTensors(
        in_proj=_rows_or_groups(weights.in_proj),
        conv=RowQuantized(qweight=weights.conv_weight, scale=weights.conv_scale),
        x_proj=_rows(weights.x_proj),
        dt_proj=_rows(weights.dt_proj),
        out_proj=_rows_or_groups(weights.out_proj),
        dt_bias=weights.dt_bias,
        A=weights.A,
        D=weights.D,
        in_bias=weights.in_proj.bias,
        conv_bias=weights.conv_bias,
        out_bias=weights.out_proj.bias,
    )


def _rows(linear: LinearWeights) -> RowQuantized:
    assert linear.scale is not None, "quantized blocks have quantized projections"
    return RowQuantized(qweight=linear.matrix, scale=linear.scale)


def _rows_or_groups(linear: LinearWeights) -> RowQuantized | GroupQuantized:
    weight = linear.weight
    if not isinstance(weight, PackedInt4) or linear.scale is None:
        return _rows(linear)
    return GroupQuantized(
        codes=unpack_int4(weight.codes, weight.columns),
        multiplier=weight.multiplier,
        scale=linear.scale,
        group_size=weight.group_size,
    )


def block_scales(weights: BlockWeights) -> DecodeScales:
    """A block's activation scales as the fused step takes them.

    Raises:
        ShapeError: one is missing.
    """
    scales = weights.scales
    values = {name: getattr(scales, name) for name in DecodeScales.__dataclass_fields__}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ShapeError(f"a fused step needs every activation scale, got none for {missing[0]}")
    return DecodeScales(**values)
