"""The blocks of a packed model on a GPU, each expanded while the one before it runs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from qmamba_cli.kernels.linear.interleaved import Interleaved, Weight
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.kernels.selective_scan.reference import ScanResult
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.weights import BlockWeights, LinearWeights

# Buffers that take turns: one block reads its own while the next one's is filled.
_TURNS = 2


class ExpandedAhead:
    """Block weights in order, packed matrices as int8 in two buffers that the blocks share.

    Expanding moves bytes, and the scan, which mostly computes, leaves room for it on every multiprocessor: a
    second stream expands the next block's matrices beside it. The model that runs them takes `backend`, whose
    scan begins that. A pass over the blocks launches on the current stream and joins the second stream to it,
    so that both can be recorded; passes must not overlap.

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
        self._begin: Callable[[torch.cuda.Event], None] | None = None
        self.backend = replace(model.backend, selective_scan=self._scan)

    def _scan(self, *args: Any, **options: Any) -> ScanResult:
        """The backend's scan, and beside it what the pass wants to begin."""
        begin, self._begin = self._begin, None
        scan = self._model.backend.selective_scan
        if begin is None:
            return scan(*args, **options)
        before = torch.cuda.Event()  # type: ignore[no-untyped-call]
        before.record(torch.cuda.current_stream(self._device))
        result = scan(*args, **options)
        # Launched behind the scan, whose thread blocks go first.
        begin(before)
        return result

    def __iter__(self) -> Iterator[BlockWeights]:
        """The blocks' weights; each is valid until the next but one is asked for."""
        blocks = self._model.weights.blocks
        current = torch.cuda.current_stream(self._device)
        expanded: list[tuple[BlockWeights, torch.cuda.Event]] = []

        def begin(before: torch.cuda.Event) -> None:
            turn = len(expanded)
            expanded.append(self._expand(blocks[turn], turn % _TURNS, before))

        for layer in range(len(blocks)):
            if len(expanded) == layer:
                # The first one, and one that no scan has begun.
                before = torch.cuda.Event()  # type: ignore[no-untyped-call]
                before.record(current)
                begin(before)
            weights, ready = expanded[layer]
            current.wait_event(ready)
            self._begin = begin if layer + 1 < len(blocks) else None
            yield weights

    def _expand(
        self, block: BlockWeights, turn: int, before: torch.cuda.Event
    ) -> tuple[BlockWeights, torch.cuda.Event]:
        """Expand a block into the buffers of its turn, which only what is before ``before`` has used."""
        from qmamba_cli.kernels.linear.operands import expand

        self._side.wait_event(before)

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
