"""A prompt through the model: in parts that fit into memory, with the state carried between them."""

from collections import OrderedDict
from typing import NamedTuple

import torch

from qmamba_cli.model.ahead import ExpandedAhead, needed
from qmamba_cli.model.graphs import Recorder, Replayed
from qmamba_cli.model.mamba import Mamba, ModelState
from qmamba_cli.model.state import assign, clear, float_state_model

# Tokens of a part, all rows together: enough to fill a GPU, little enough for the memory of one.
_PART_TOKENS = 16384
_LONGEST_PART = 2048
# Parts end where a chunk of the chunked scan ends, so that cutting a prompt does not move a chunk.
_SHORTEST_PART = 64
# Recordings that are kept; a prompt of yet another length takes the place of the one used longest ago.
_MOST_RECORDINGS = 8


def part_length(batch: int) -> int:
    """Tokens of a row that go through the model at once: a power of two from 64 to 2048.

    >>> part_length(1), part_length(16), part_length(1000)
    (2048, 1024, 64)
    """
    fitting = max(1, _PART_TOKENS // batch)
    return max(_SHORTEST_PART, min(_LONGEST_PART, 1 << (fitting.bit_length() - 1)))


class Prefilled(NamedTuple):
    """What a prompt leaves behind.

    Attributes:
        hidden: (b, d_model), what lm_head reads, of the last token.
        state: of `float_state_model`, after the last token. With a recorder, the prefill's own tensors,
            which the next prompt overwrites.
    """

    hidden: torch.Tensor
    state: ModelState


class _Part(NamedTuple):
    ids: torch.Tensor
    work: Replayed


class Prefill:
    """Runs prompts of one batch size.

    Between the parts of a prompt the scan state stays float32 in every mode, so that cutting changes nothing
    but float32 order. With a recorder, a part of a length that was seen before is replayed.

    Args:
        model: the model in its mode.
        batch: rows.
        recorder: None launches everything anew.
        longest: tokens of a part; `part_length` if left out.
    """

    def __init__(
        self, model: Mamba, batch: int, recorder: Recorder | None = None, longest: int | None = None
    ) -> None:
        self._model = float_state_model(model)
        self._ahead = ExpandedAhead(self._model) if needed(self._model) else None
        self._batch = batch
        self._recorder = recorder
        self._longest = longest or part_length(batch)
        self._state: ModelState | None = None
        self._hidden: torch.Tensor | None = None
        self._parts: OrderedDict[int, _Part] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> Prefilled:
        """Run one prompt a row from its first token.

        Args:
            ids: (b, l) int64, l >= 1, on any device.
        """
        parts = torch.split_with_sizes(ids.to(self._model.backend.device), self._lengths(ids.shape[1]), dim=1)
        if self._recorder is None:
            hidden, state = self._model.forward(parts[0], blocks=self._ahead)
            for part in parts[1:]:
                hidden, state = self._model.forward(part, state, blocks=self._ahead)
            return Prefilled(hidden[:, -1], state)
        if self._state is None:
            self._recorder.warm(self._allocate)
        assert self._state is not None and self._hidden is not None
        clear(self._state)
        for part in parts:
            buffered = self._part(part.shape[1])
            buffered.ids.copy_(part)
            buffered.work()
        return Prefilled(self._hidden, self._state)

    def _lengths(self, length: int) -> list[int]:
        whole, rest = divmod(length, self._longest)
        return [self._longest] * whole + [rest] * (rest > 0)

    def _allocate(self) -> None:
        """State and output at fixed addresses, of the shapes and dtypes that one token shows."""
        ids = torch.zeros(self._batch, 1, dtype=torch.int64, device=self._model.backend.device)
        hidden, self._state = self._model.forward(ids)
        self._hidden = hidden[:, -1].clone()

    def _part(self, length: int) -> _Part:
        if length not in self._parts:
            ids = torch.zeros(self._batch, length, dtype=torch.int64, device=self._model.backend.device)
            self._parts[length] = _Part(ids, Replayed(lambda: self._run(ids), self._recorder))
        self._parts.move_to_end(length)
        while len(self._parts) > _MOST_RECORDINGS:
            self._parts.popitem(last=False)
        return self._parts[length]

    def _run(self, ids: torch.Tensor) -> None:
        assert self._state is not None and self._hidden is not None
        hidden, state = self._model.forward(ids, self._state, blocks=self._ahead)
        assign(self._state, state)
        self._hidden.copy_(hidden[:, -1])
