"""A model's state as a set of tensors: copied, cleared, and put on the grid of its mode."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch

from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.model.block import BlockState
from qmamba_cli.model.mamba import Mamba, ModelState
from qmamba_cli.modes import State


def float_state_model(model: Mamba) -> Mamba:
    """The model with a float32 scan state between calls, every other column as it is; weights are shared.

    Parts of one prompt carry their state in it: an int8 state would be rounded at every seam.
    """
    if model.mode.state is State.FP32:
        return model
    return Mamba(model.weights, model.mode.with_columns({"state": State.FP32}), model.backend)


def on_grid(model: Mamba, state: ModelState) -> ModelState:
    """A float32 state of `float_state_model` as the model itself would have returned it.

    The scan's last step is the same rounding, so that the two are equal bit for bit.
    """
    if model.mode.state is State.FP32:
        return state
    layers = []
    for weights, layer in zip(model.weights.blocks, state, strict=True):
        scale = weights.scales.ssm_state
        assert scale is not None, "quantized weights carry every scale"
        layers.append(BlockState(layer.conv, model.backend.quantize(layer.ssm, scale)))
    return layers


def rows_of(state: ModelState, row: int) -> ModelState:
    """One row of a state, as a view."""
    return [_mapped(layer, lambda tensor: tensor[row : row + 1]) for layer in state]


def joined(states: Sequence[ModelState]) -> ModelState:
    """States of some rows each, one behind another in new tensors."""
    layers = []
    for parts in zip(*states, strict=True):
        scales = [part.conv.scale for part in parts if part.conv.scale is not None]
        conv = ConvState(
            torch.cat([part.conv.values for part in parts]), torch.cat(scales) if scales else None
        )
        layers.append(BlockState(conv, torch.cat([part.ssm for part in parts])))
    return layers


def cleared_rows(like: ModelState, rows: int) -> ModelState:
    """A new state before the first token, with so many rows of the shapes of another."""
    state = [_mapped(layer, lambda tensor: tensor.new_empty(rows, *tensor.shape[1:])) for layer in like]
    clear(state)
    return state


def _mapped(layer: BlockState, change: Callable[[torch.Tensor], torch.Tensor]) -> BlockState:
    scale = layer.conv.scale
    conv = ConvState(change(layer.conv.values), None if scale is None else change(scale))
    return BlockState(conv, change(layer.ssm))


@torch.inference_mode()
def assign(target: ModelState, source: ModelState) -> None:
    """Copy one state into the tensors of another, in a few launches; shared tensors are left alone."""
    pairs: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for to, come in zip(_tensors(target), _tensors(source), strict=True):
        if to is not come:
            targets, sources = pairs[to.dtype]
            targets.append(to)
            sources.append(come)
    for targets, sources in pairs.values():
        torch._foreach_copy_(targets, sources)


@torch.inference_mode()
def clear(state: ModelState) -> None:
    """Make it the state before the first token: zeros, and ones for the scales of the conv's inputs."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for tensor in _tensors(state):
        by_dtype[tensor.dtype].append(tensor)
    for tensors in by_dtype.values():
        torch._foreach_zero_(tensors)
    scales = [layer.conv.scale for layer in state if layer.conv.scale is not None]
    if scales:
        torch._foreach_add_(scales, 1.0)


def _tensors(state: ModelState) -> Iterable[torch.Tensor]:
    for layer in state:
        yield layer.conv.values
        if layer.conv.scale is not None:
            yield layer.conv.scale
        yield layer.ssm
