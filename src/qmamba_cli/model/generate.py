"""Generation through the decode path of a mode: one prefill, then one-token steps with carried state."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.errors import UsageError
from qmamba_cli.model.mamba import Mamba


def generate(
    model: Mamba,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Continue one prompt, token by token, as each becomes known.

    Args:
        model: the model in its mode.
        prompt: token ids, at least one.
        max_new_tokens: how many tokens to make at most.
        temperature: 0 takes the most likely token; above it, logits are divided by it and sampled.
        seed: of the sampling; the same arguments give the same tokens.
        eos_id: the token that ends the text and is not returned, or None.
        vocab_size: ids from here on are padding of the vocabulary and are never made, or None.

    Yields:
        One token id at a time.

    Raises:
        UsageError: the prompt is empty or an argument is out of range.
    """
    if not prompt:
        raise UsageError("the prompt has no tokens, expected at least one")
    if max_new_tokens < 1:
        raise UsageError(f"`--max-new-tokens` must be at least 1, got {max_new_tokens}")
    sampler = torch.Generator().manual_seed(seed)
    hidden, state = model.forward(torch.tensor([list(prompt)], dtype=torch.int64))
    for made in range(max_new_tokens):
        token = _pick(model.logits(hidden[:, -1]), temperature, sampler, vocab_size)
        if token.item() == eos_id:
            return
        yield int(token.item())
        if made + 1 < max_new_tokens:
            hidden, state = model.forward(token.unsqueeze(1), state)


def sample_sequences(
    model: Mamba, start: NDArray[np.int64], *, length: int, seed: int, vocab_size: int | None = None
) -> NDArray[np.int64]:
    """Sample a batch of sequences at temperature 1.

    Args:
        model: the model in its mode.
        start: (b,) ids that the sequences begin after.
        length: tokens to sample; the start token is not one of them.
        seed: of the sampling; the same arguments give the same tokens.
        vocab_size: as for `generate`.

    Returns:
        (b, length) int64.
    """
    sampler = torch.Generator().manual_seed(seed)
    tokens = torch.empty(len(start), length, dtype=torch.int64)
    current, state = torch.from_numpy(start), None
    for position in range(length):
        hidden, state = model.forward(current.unsqueeze(1), state)
        current = _pick(model.logits(hidden[:, -1]), 1.0, sampler, vocab_size)
        tokens[:, position] = current
    return tokens.numpy()


def _pick(
    logits: torch.Tensor, temperature: float, sampler: torch.Generator, vocab_size: int | None
) -> torch.Tensor:
    """(b, V) logits to (b,) token ids."""
    if temperature < 0:
        raise UsageError(f"`--temperature` must be >= 0, got {temperature}")
    known = logits[:, :vocab_size].float().cpu()
    if temperature == 0:
        return known.argmax(dim=-1)
    probabilities = torch.softmax(known / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=sampler).squeeze(1)
