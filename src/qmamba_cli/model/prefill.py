"""A prompt through the model: in parts that fit into memory, with the state carried between them."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from qmamba_cli.kernels.ragged import ragged
from qmamba_cli.model.ahead import ExpandedAhead, needed
from qmamba_cli.model.graphs import Recorder, Replayed
from qmamba_cli.model.mamba import Mamba, ModelState
from qmamba_cli.model.state import assign, cleared_rows, float_state_model, joined, rows_of

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


# A prompt's row, and its tokens from the first to before the last.
class _Segment(NamedTuple):
    row: int
    first: int
    last: int


def _packed(lengths: Sequence[int], most: int) -> Iterator[list[_Segment]]:
    """Prompts one behind another, cut where ``most`` tokens are together and a chunk of the scan ends.

    >>> [[tuple(segment) for segment in segments] for segments in _packed([3, 200, 1], 128)]
    [[(0, 0, 3), (1, 0, 64)], [(1, 64, 192)], [(1, 192, 200), (2, 0, 1)]]
    """
    segments: list[_Segment] = []
    room = most
    for row, length in enumerate(lengths):
        first = 0
        while first < length:
            last = length if length - first <= room else first + room // _SHORTEST_PART * _SHORTEST_PART
            if last > first:
                segments.append(_Segment(row, first, last))
            room -= last - first
            if last < length:
                yield segments
                segments, room = [], most
            first = last
    if segments:
        yield segments


def _continued(begun: ModelState, rows: int) -> ModelState:
    """The state of several rows of which the first has begun."""
    return begun if rows == 1 else joined([begun, cleared_rows(begun, rows - 1)])


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
        self._ahead: ExpandedAhead | None = None
        if needed(self._model):
            self._ahead = ExpandedAhead(self._model)
            self._model = Mamba(self._model.weights, self._model.mode, self._ahead.backend)
        self._batch = batch
        self._recorder = recorder
        self._longest = longest or part_length(batch)
        self._state: ModelState | None = None
        self._hidden: torch.Tensor | None = None
        self._parts: OrderedDict[tuple[int, bool], _Part] = OrderedDict()

    @torch.inference_mode()
    def ragged(self, ids: torch.Tensor, lengths: Sequence[int]) -> Prefilled:
        """Run prompts of different lengths from their first tokens; no work is done on padding.

        Their tokens lie one behind another in rows of at most ``longest`` times the batch size; nothing is
        recorded, since hardly any two batches have the same lengths.

        Args:
            ids: (b, l) int64 on any device; row i counts up to ``lengths[i]``.
            lengths: b numbers from 1 to l.
        """
        ids = ids.to(self._model.backend.device)
        whole: dict[int, tuple[torch.Tensor, ModelState]] = {}
        begun: ModelState | None = None
        for segments in _packed(lengths, self._longest * self._batch):
            tokens = torch.cat([ids[row, first:last] for row, first, last in segments]).unsqueeze(0)
            sizes = [last - first for _, first, last in segments]
            model = Mamba(self._model.weights, self._model.mode, ragged(self._model.backend, sizes))
            # Only the first sequence of a row can have begun in the row before.
            state = None if begun is None else _continued(begun, len(segments))
            hidden, state = model.forward(tokens, state, blocks=self._ahead)
            ends = [end - 1 for end in accumulate(sizes)]
            for place, (row, _, last) in enumerate(segments):
                if last == lengths[row]:
                    whole[row] = (hidden[0, ends[place]], rows_of(state, place))
            row, _, last = segments[-1]
            begun = rows_of(state, len(segments) - 1) if last < lengths[row] else None
        states = joined([whole[row][1] for row in range(len(lengths))])
        last_hidden = torch.stack([whole[row][0] for row in range(len(lengths))])
        if self._recorder is None:
            return Prefilled(last_hidden, states)
        if self._state is None:
            self._recorder.warm(self._allocate)
        assert self._state is not None and self._hidden is not None
        assign(self._state, states)
        self._hidden.copy_(last_hidden)
        return Prefilled(self._hidden, self._state)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> Prefilled:
        """Run one prompt a row from its first token.

        Args:
            ids: (b, l) int64, l >= 1, on any device.
        """
        parts = torch.split_with_sizes(ids, self._lengths(ids.shape[1]), dim=1)
        if self._recorder is None:
            hidden, state = self._forward(parts[0], None)
            for part in parts[1:]:
                hidden, state = self._forward(part, state)
            return Prefilled(hidden[:, -1], state)
        if self._state is None:
            self._recorder.warm(self._allocate)
        assert self._state is not None and self._hidden is not None
        for i, part in enumerate(parts):
            buffered = self._part(part.shape[1], begins=i == 0)
            buffered.ids.copy_(part)
            buffered.work()
        return Prefilled(self._hidden, self._state)

    def _forward(self, ids: torch.Tensor, state: ModelState | None) -> tuple[torch.Tensor, ModelState]:
        return self._model.forward(ids, state, blocks=self._ahead)

    def _lengths(self, length: int) -> list[int]:
        whole, rest = divmod(length, self._longest)
        return [self._longest] * whole + [rest] * (rest > 0)

    def _allocate(self) -> None:
        """State and output at fixed addresses, of the shapes and dtypes that one token shows."""
        ids = torch.zeros(self._batch, 1, dtype=torch.int64, device=self._model.backend.device)
        hidden, self._state = self._model.forward(ids)
        self._hidden = hidden[:, -1].clone()

    def _part(self, length: int, *, begins: bool) -> _Part:
        key = (length, begins)
        if key not in self._parts:
            ids = torch.zeros(self._batch, length, dtype=torch.int64, device=self._model.backend.device)
            self._parts[key] = _Part(ids, Replayed(lambda: self._run(ids, begins=begins), self._recorder))
        self._parts.move_to_end(key)
        while len(self._parts) > _MOST_RECORDINGS:
            self._parts.popitem(last=False)
        return self._parts[key]

    def _run(self, ids: torch.Tensor, *, begins: bool) -> None:
        assert self._state is not None and self._hidden is not None
        hidden, state = self._forward(ids, None if begins else self._state)
        assign(self._state, state)
        self._hidden.copy_(hidden[:, -1])
