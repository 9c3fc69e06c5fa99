"""Generation through the decode path of a mode: one prompt, then one-token steps with carried state."""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.errors import UsageError
from qmamba_cli.model.decode import Decoder
from qmamba_cli.model.mamba import Mamba

# Steps that a GPU is given before the host waits for a token: enough to cover what the host does with it.
_STEPS_AHEAD = 8

# Waits for tokens that were asked for earlier and returns them.
_Wait: TypeAlias = Callable[[], list[int]]


@dataclass(slots=True)
class GenerationTimes:
    """How long a generation took, as its reader saw it.

    Attributes:
        first_token_s: from the prompt to the first token, seconds; preparing is left out.
        decode_s: from the first to the last token, seconds.
        steps: tokens after the first.
    """

    first_token_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one; 0 where there was only one."""
        return self.steps / self.decode_s if self.decode_s > 0 else 0.0


def generate(
    model: Mamba,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    times: GenerationTimes | None = None,
) -> Iterator[int]:
    """Continue one prompt, token by token, as each becomes known.

    Args:
        model: the model in its mode.
        prompt: token ids, at least one.
        max_new_tokens: how many tokens to make at most.
        temperature: 0 takes the most likely token; above it, logits are divided by it and sampled.
        seed: of the sampling; the same arguments give the same tokens on the same device.
        eos_id: the token that ends the text and is not returned, or None.
        vocab_size: ids from here on are padding of the vocabulary and are never made, or None.
        times: filled in as tokens are made, if given.

    Yields:
        One token id at a time.

    Raises:
        UsageError: the prompt is empty or an argument is out of range.
    """
    if not prompt:
        raise UsageError("the prompt has no tokens, expected at least one")
    if max_new_tokens < 1:
        raise UsageError(f"`--max-new-tokens` must be at least 1, got {max_new_tokens}")
    decoder = Decoder(model, 1, vocab_size=vocab_size)
    if max_new_tokens > 1:
        decoder.prepare(temperature)
    ids = torch.tensor([list(prompt)], dtype=torch.int64)
    rows = decode_tokens(
        decoder, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, times=times
    )
    for (token,) in rows:
        if token == eos_id:
            return
        yield token


def decode_tokens(
    decoder: Decoder,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    lengths: Sequence[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    times: GenerationTimes | None = None,
) -> Iterator[list[int]]:
    """Continue a batch of prompts; on a GPU the host runs behind the device and never holds it up.

    A reader that stops early leaves a few steps behind that nobody reads.

    Args:
        decoder: of the batch size of ``ids``.
        ids: (b, l) int64.
        max_new_tokens: tokens a row, at least 1.
        lengths: tokens of each prompt, where they differ; as for `Decoder.start`.
        temperature: as for `generate`.
        seed: as for `generate`.
        times: filled in as tokens are made, if given.

    Yields:
        The next token of every row.
    """
    ahead = _STEPS_AHEAD if decoder.device.type == "cuda" else 0
    times = GenerationTimes() if times is None else times
    reader = _TokenReader(decoder.device, decoder.batch, ahead + 1)
    begin = time.perf_counter()
    started = decoder.start(ids, lengths=lengths, temperature=temperature, seed=seed)
    pending: deque[_Wait] = deque([reader.ask(started)])
    made, first = 1, 0.0
    while pending or made < max_new_tokens:
        while made < max_new_tokens and len(pending) <= ahead:
            pending.append(reader.ask(decoder.step()))
            made += 1
        tokens = pending.popleft()()
        now = time.perf_counter()
        if not first:
            first = now
            times.first_token_s = now - begin
        else:
            times.steps += 1
            times.decode_s = now - first
        yield tokens


class _TokenReader:
    """Brings tokens to the host without waiting for them at once."""

    def __init__(self, device: torch.device, batch: int, slots: int) -> None:
        self._events = []
        if device.type == "cuda":
            self._slots = [torch.empty(batch, dtype=torch.int64, pin_memory=True) for _ in range(slots)]
            self._events = [torch.cuda.Event() for _ in range(slots)]  # type: ignore[no-untyped-call]
        self._asked = 0

    def ask(self, tokens: torch.Tensor) -> _Wait:
        """Have (b,) tokens copied; a slot is used again after as many questions as there are slots."""
        if not self._events:
            values: list[int] = tokens.tolist()
            return lambda: values
        slot = self._asked % len(self._slots)
        self._asked += 1
        self._slots[slot].copy_(tokens, non_blocking=True)
        self._events[slot].record()

        def wait() -> list[int]:
            self._events[slot].synchronize()
            return list(self._slots[slot].tolist())

        return wait


def sample_sequences(
    model: Mamba,
    start: NDArray[np.int64],
    *,
    length: int,
    seed: int,
    vocab_size: int | None = None,
    on_tokens: Callable[[int], object] = lambda _count: None,
) -> NDArray[np.int64]:
    """Sample a batch of sequences at temperature 1.

    Args:
        model: the model in its mode.
        start: (b,) ids that the sequences begin after.
        length: tokens to sample; the start token is not one of them.
        seed: of the sampling; the same arguments give the same tokens on the same device.
        vocab_size: as for `generate`.
        on_tokens: told how many tokens were made; on a GPU, asked for.

    Returns:
        (b, length) int64.
    """
    decoder = Decoder(model, len(start), vocab_size=vocab_size)
    tokens = torch.empty(len(start), length, dtype=torch.int64, device=decoder.device)
    begin = torch.from_numpy(start).unsqueeze(1)
    for position in range(length):
        made = decoder.step() if position else decoder.start(begin, temperature=1.0, seed=seed)
        tokens[:, position] = made
        on_tokens(len(start))
    # What a decoder records refers back to it: its states would stay until the collector happens to run.
    del decoder
    gc.collect()
    return tokens.cpu().numpy()
