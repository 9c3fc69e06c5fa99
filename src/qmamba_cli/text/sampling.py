"""Choosing calibration samples: token windows of one length, seeded and recorded.

Order. With ``shuffle`` every candidate (a row, or a window of a txt file) is given the next 64-bit word of
PCG64(seed), and candidates are taken in ascending order of their words. numpy guarantees that stream for all
versions and platforms, which it does not for ``Generator.permutation``; and because a candidate's word
depends on nothing but its number, a text of unknown length can be sampled while it streams by.

Pieces. A text longer than 65 536 characters is tokenized in pieces, each cut before a lone space (no white
space on either side of it). Tokenizers that split text into words before merging, as the byte-level BPE of
the Mamba models does, give the tokens of the whole text. A tokenizer that marks the beginning of a text puts
its mark at the beginning of every piece. Where a million characters hold no such space the piece ends there.
"""

import hashlib
import heapq
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qmamba_cli.errors import DatasetError, ShapeError, UsageError
from qmamba_cli.text.documents import SELF, Documents, TextFile

# Sequences that a model writes together.
SELF_BATCH = 64
_PIECE_CHARACTERS = 1 << 16
_LONGEST_PIECE = 1 << 20
# Rows are fetched in blocks, each in ascending order: a parquet file is then read forwards.
_SMALLEST_BLOCK = 256
_LARGEST_BLOCK = 8192


class Encoder(Protocol):
    """Turns text into token ids."""

    def encode(self, text: str, /, *, special_tokens: bool) -> list[int]:
        """Ids of ``text``; calibration always asks for ``special_tokens`` False."""


class Generate(Protocol):
    """Samples token sequences from a model at temperature 1."""

    def __call__(self, start: NDArray[np.int64], *, length: int, seed: int) -> NDArray[np.integer]:
        """Continue each start token by ``length`` tokens.

        Args:
            start: (b,) ids that the sequences begin after.
            length: tokens to sample; the start token is not one of them.
            seed: 0 <= seed < 2**63; the same arguments give the same tokens.

        Returns:
            (b, length) ids.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Token windows and where they came from.

    Attributes:
        tokens: (samples, seqlen) int32, C-contiguous, in the order they were chosen.
        ids: a number for each row of ``tokens``, 0-based: the dataset's row, or the txt file's window.
        dataset: the source as the user named it.
        digest: sha256 in hex of the source, see `Documents`; for ``self`` of the tokens, little-endian int32.
        skipped_short: rows that were passed over because they hold fewer than seqlen tokens.
    """

    tokens: NDArray[np.int32]
    ids: list[int]
    dataset: str
    digest: str
    skipped_short: int


def choose_samples(
    documents: Documents, encoder: Encoder, *, samples: int, seqlen: int, seed: int, shuffle: bool
) -> Samples:
    """Choose token windows, deterministic given the documents, the encoder and the arguments.

    A row gives one sample, its first ``seqlen`` tokens; a shorter row is passed over and counted. A txt file
    is one text: its tokens are cut into consecutive windows of ``seqlen``, the rest at the end is dropped.

    Args:
        documents: the source.
        encoder: text to token ids, for instance a `qmamba_cli.tokenizer.Tokenizer`.
        samples: windows to choose, at least 1.
        seqlen: tokens a window, at least 1.
        seed: at least 0; decides the order, see the module's text. Not used without ``shuffle``.
        shuffle: take candidates in seeded order, else in the order of the source.

    Returns:
        The windows. Beside them only the numbers of the rows are held in memory, 16 bytes a row.

    Raises:
        DatasetError: fewer than ``samples`` windows are there, or a row cannot be read.
        UsageError: an argument is out of range.
    """
    _check_at_least("samples", samples, 1)
    _check_at_least("seqlen", seqlen, 1)
    _check_at_least("seed", seed, 0)
    if isinstance(documents, TextFile):
        return _choose_windows(documents, encoder, samples, seqlen, seed if shuffle else None)
    return _choose_rows(documents, encoder, samples, seqlen, seed if shuffle else None)


def sample_from_model(
    generate: Generate,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    vocab_size: int,
    start_id: int | None,
    batch_size: int = SELF_BATCH,
) -> Samples:
    """Sample calibration text from the model itself.

    Deterministic given ``generate`` and the arguments, ``batch_size`` included: a batch is sampled with one
    seed, derived from ``seed`` and the batch's number.

    Args:
        generate: samples one batch from the float model.
        samples: sequences, at least 1.
        seqlen: tokens a sequence, at least 1; the start token is not one of them.
        seed: at least 0.
        vocab_size: ids the tokenizer knows, at least 1; sampled ids must lie below it.
        start_id: the token that begins a text (bos, else eos), or None for a seeded random id a sequence.
        batch_size: sequences sampled together, at least 1.

    Returns:
        The sequences, with ids 0 to samples - 1.

    Raises:
        ShapeError: ``generate`` returned another shape, or ids outside of the vocabulary.
        UsageError: an argument is out of range.
    """
    for name, value, least in (
        ("samples", samples, 1),
        ("seqlen", seqlen, 1),
        ("seed", seed, 0),
        ("vocab_size", vocab_size, 1),
        ("batch_size", batch_size, 1),
    ):
        _check_at_least(name, value, least)
    tokens = np.empty((samples, seqlen), dtype=np.int32)
    for number, first in enumerate(range(0, samples, batch_size)):
        rows = min(batch_size, samples - first)
        words = np.random.PCG64([seed, number]).random_raw(1 + rows)
        if start_id is None:
            start = (words[1:] % np.uint64(vocab_size)).astype(np.int64)
        else:
            start = np.full(rows, start_id, dtype=np.int64)
        # 63 bits, so that the seed fits a signed integer wherever it is handed on to.
        batch = generate(start, length=seqlen, seed=int(words[0] >> np.uint64(1)))
        if batch.shape != (rows, seqlen):
            raise ShapeError(f"sampled tokens: wrong shape, got {batch.shape}, expected {(rows, seqlen)}")
        if batch.min() < 0 or batch.max() >= vocab_size:
            raise ShapeError(
                f"sampled tokens: id out of range, got {batch.min()} to {batch.max()}, "
                f"expected 0 to {vocab_size - 1}"
            )
        tokens[first : first + rows] = batch
    digest = hashlib.sha256(tokens.astype("<i4", copy=False).data).hexdigest()
    return Samples(tokens=tokens, ids=list(range(samples)), dataset=SELF, digest=digest, skipped_short=0)


def _choose_rows(
    documents: Documents, encoder: Encoder, samples: int, seqlen: int, seed: int | None
) -> Samples:
    """One window a row; ``seed`` None keeps the source's order."""
    count = len(documents)
    order = np.arange(count) if seed is None else np.argsort(_words(seed, count), kind="stable")
    tokens = np.empty((0, seqlen), dtype=np.int32)
    ids: list[int] = []
    skipped = longest = position = 0
    while len(ids) < samples and position < count:
        block = order[position : position + _block_rows(samples - len(ids), len(ids), position)].tolist()
        position += len(block)
        heads = {row: _head(documents[row], encoder, seqlen) for row in sorted(block)}
        for row in block:
            head = heads.pop(row)
            if len(head) < seqlen:
                skipped += 1
                longest = max(longest, len(head))
                continue
            if not ids:
                # Not before: a length that no row reaches must not become an allocation.
                tokens = np.empty((min(samples, count), seqlen), dtype=np.int32)
            tokens[len(ids)] = head
            ids.append(row)
            if len(ids) == samples:
                break
    if len(ids) < samples:
        raise _too_few_rows(documents, samples, seqlen, len(ids), skipped, longest)
    return Samples(
        tokens=tokens, ids=ids, dataset=documents.name, digest=documents.digest, skipped_short=skipped
    )


def _choose_windows(
    document: TextFile, encoder: Encoder, samples: int, seqlen: int, seed: int | None
) -> Samples:
    """Windows of one text, of which at most ``samples`` are held; ``seed`` None keeps the text's order."""
    generator = None if seed is None else np.random.PCG64(seed)
    # A heap of (-word, -number): its first element is the candidate that the next better one replaces.
    kept: list[tuple[int, int]] = []
    held: dict[int, NDArray[np.int32]] = {}
    windows = _windows(_pieces(document.blocks(_PIECE_CHARACTERS)), encoder, seqlen)
    count = length = 0
    while True:
        try:
            window = next(windows)
        except StopIteration as stop:
            length = stop.value
            break
        key = (-(count if generator is None else int(generator.random_raw())), -count)
        count += 1
        if len(kept) < samples:
            heapq.heappush(kept, key)
            held[-key[1]] = window
        elif generator is None:
            break
        elif key > kept[0]:
            del held[-heapq.heapreplace(kept, key)[1]]
            held[-key[1]] = window
    if len(kept) < samples:
        raise _too_few_windows(document, samples, seqlen, count, length)
    ids = [-number for _, number in sorted(kept, reverse=True)]
    tokens = np.stack([held[number] for number in ids])
    return Samples(tokens=tokens, ids=ids, dataset=document.name, digest=document.digest, skipped_short=0)


def _words(seed: int, count: int) -> NDArray[np.uint64]:
    """The first ``count`` 64-bit words of PCG64(seed)."""
    return np.random.PCG64(seed).random_raw(count)


def _block_rows(missing: int, accepted: int, walked: int) -> int:
    """Rows to fetch next: those missing, allowing for the share that was too short so far."""
    wanted = missing if walked == 0 else missing * walked // max(accepted, 1)
    return min(max(wanted, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def _head(text: str, encoder: Encoder, seqlen: int) -> NDArray[np.int32]:
    """The first ``seqlen`` tokens of a text, or all of them if there are fewer."""
    tokens: list[int] = []
    for piece in _pieces(_blocks(text)):
        tokens += encoder.encode(piece, special_tokens=False)
        if len(tokens) >= seqlen:
            break
    return np.array(tokens[:seqlen], dtype=np.int32)


def _windows(pieces: Iterable[str], encoder: Encoder, seqlen: int) -> Generator[NDArray[np.int32], None, int]:
    """Consecutive windows of ``seqlen`` tokens; returns the number of tokens in all."""
    rest: list[int] = []
    length = 0
    for piece in pieces:
        ids = encoder.encode(piece, special_tokens=False)
        length += len(ids)
        rest += ids
        complete = len(rest) - len(rest) % seqlen
        for first in range(0, complete, seqlen):
            yield np.array(rest[first : first + seqlen], dtype=np.int32)
        del rest[:complete]
    return length


def _blocks(text: str) -> Iterator[str]:
    for first in range(0, len(text), _PIECE_CHARACTERS):
        yield text[first : first + _PIECE_CHARACTERS]


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text that arrives in blocks at places where tokens end, see the module's text.

    >>> list(_pieces(["one two  th", "ree four"]))
    ['one', ' two  three four']
    """
    held = ""
    for block in blocks:
        # There is more text to come, so what is held may end inside a token.
        cut = _last_lone_space(held)
        if cut or len(held) >= _LONGEST_PIECE:
            yield held[: cut or len(held)]
            held = held[cut:] if cut else ""
        held += block
    if held:
        yield held


def _last_lone_space(text: str) -> int:
    """Index of the last space with no white space on either side of it, or 0."""
    index = text.rfind(" ", 0, max(len(text) - 1, 0))
    while index > 0 and (text[index - 1].isspace() or text[index + 1].isspace()):
        index = text.rfind(" ", 0, index)
    return max(index, 0)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"`{name}`: out of range, got {value}, expected at least {least}")


def _too_few_rows(
    documents: Documents, samples: int, seqlen: int, available: int, skipped: int, longest: int
) -> DatasetError:
    """The error for a source with too few long rows."""
    short = f"{_count(skipped, 'row')} of {len(documents)} {'is' if skipped == 1 else 'are'} too short"
    if available == 0:
        return DatasetError(
            f"`{documents.name}`: text too short for one sample, "
            f"got at most {_count(longest, 'token')} a row ({short}), expected at least {seqlen}",
            hint=_shorter(longest),
        )
    return DatasetError(
        f"`{documents.name}`: too few rows of at least {_count(seqlen, 'token')}, got {available}, "
        f"expected {samples} ({short}, the longest of them has {_count(longest, 'token')})"
        if skipped
        else f"`{documents.name}`: too few rows, got {available}, expected {samples}",
        hint=f"take `--samples {available}`" + (", or a smaller `--seqlen`" if skipped else ""),
    )


def _too_few_windows(
    document: TextFile, samples: int, seqlen: int, available: int, length: int
) -> DatasetError:
    """The error for a txt file with too little text."""
    if available == 0:
        return DatasetError(
            f"`{document.name}`: text too short for one sample, got {_count(length, 'token')}, "
            f"expected at least {seqlen}",
            hint=_shorter(length),
        )
    return DatasetError(
        f"`{document.name}`: too few windows of {_count(seqlen, 'token')}, got {available} "
        f"({_count(length, 'token')} of text), expected {samples}",
        hint=f"take `--samples {available}`, or a smaller `--seqlen`",
    )


def _shorter(length: int) -> str:
    return (f"take `--seqlen {length}` or less, or " if length else "take ") + "a longer text"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
