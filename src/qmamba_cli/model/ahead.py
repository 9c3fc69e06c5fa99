"""The blocks of a packed model on a GPU, each expanded while the one before it runs."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from qmamba_cli.kernels.linear.interleaved import Interleaved, Weight
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.weights import BlockWeights, LinearWeights

# Buffers that take turns: one block reads its own while the next one's is filled.
_TURNS = 2


class ExpandedAhead:
    """Block weights in order, packed matrices as int8 in two buffers that the blocks share.

    Expanding moves bytes and the kernels of a block mostly compute, so a second stream hides one behind the
    other. A pass over the blocks launches on the current stream and joins the second stream to it, so that
    both can be recorded; passes must not overlap.

    Args:
        model: on a GPU; `needed` says whether any of its matrices is to be expanded.
    """

    def __init__(self, model: Mamba) -> None:
        self._model = model
        self._device = model.backend.device
        self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        wide = [
            max(_elements(getattr(block, name)) for block in model.weights.blocks)
            for name in ("in_proj", "out_proj")
        ]
        self._buffers = [
            [torch.empty(size, dtype=torch.int8, device=self._device) for size in wide] for _ in range(_TURNS)
        ]

    def __iter__(self) -> Iterator[BlockWeights]:
        """The blocks' weights; each is valid until the next but one is asked for."""
        blocks = self._model.weights.blocks
        current = torch.cuda.current_stream(self._device)
        ahead, ready = self._expand(blocks[0], 0, current)
        for layer in range(len(blocks)):
            weights = ahead
            current.wait_event(ready)
            if layer + 1 < len(blocks):
                ahead, ready = self._expand(blocks[layer + 1], (layer + 1) % _TURNS, current)
            yield weights

    def _expand(
        self, block: BlockWeights, turn: int, current: torch.cuda.Stream
    ) -> tuple[BlockWeights, torch.cuda.Event]:
        from qmamba_cli.kernels.linear.operands import expand

        # What was launched so far has used this buffer before.
        self._side.wait_stream(current)

        def rows(linear: LinearWeights, buffer: torch.Tensor) -> LinearWeights:
            weight = linear.weight
            if not _is_expanded_first(weight):
                return linear
            m, k = weight.shape
            return replace(linear, weight=expand(weight, buffer[: m * k].view(m, k)))

        with torch.cuda.stream(self._side):
            in_buffer, out_buffer = self._buffers[turn]
            expanded = replace(
                block, in_proj=rows(block.in_proj, in_buffer), out_proj=rows(block.out_proj, out_buffer)
            )
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._side)
        return expanded, ready


def needed(model: Mamba) -> bool:
    """Whether a model on a GPU has matrices that a product of many tokens would first expand."""
    return model.backend.device.type == "cuda" and any(
        _is_expanded_first(linear.weight)
        for block in model.weights.blocks
        for linear in (block.in_proj, block.out_proj)
    )


def _is_expanded_first(weight: Weight) -> bool:
    return isinstance(weight, Interleaved | PackedInt4)


def _elements(linear: LinearWeights) -> int:
    m, k = linear.weight.shape
    return m * k if _is_expanded_first(linear.weight) else 0
