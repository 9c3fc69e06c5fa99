"""Documents and windows as batches of token ids, with the positions of them that are scored."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qmamba_cli.errors import CheckpointError, DatasetError, ShapeError, UsageError
from qmamba_cli.evaluation.documents import last_word_split
from qmamba_cli.tokenizer import Tokenizer

MAX_LENGTH = 2048
"""Longest input in tokens; a longer context loses its beginning."""

# Right padding never reaches a scored position of a causal model; lm-eval pads with the same id.
_PADDING_ID = 0


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One document as tokens.

    Attributes:
        tokens: context and continuation.
        scored: how many of them, at the end, are the continuation.
    """

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Inputs that run together, and the t positions of them that are scored.

    Attributes:
        ids: (b, l) int64, padded on the right.
        rows: (t,) int64, the input that a scored token is predicted from.
        positions: (t,) int64, the place in it whose logits predict the token.
        targets: (t,) int64, the token.
        documents: index of each document (window) of the batch, in the order of its scored tokens.
        tokens: scored tokens of each of these documents; they sum to t.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    documents: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def largest_id(self) -> int:
        """The largest token id, read or scored."""
        return max(int(self.ids.max()), int(self.targets.max()))


def last_word_requests(
    tokenizer: Tokenizer, documents: Sequence[str], *, max_length: int = MAX_LENGTH
) -> list[ScoreRequest]:
    """Documents as requests for their last word, in the order of the documents.

    Context and continuation are tokenized together and parted behind the tokens of the context alone, with
    the tokenizer's default special tokens.

    Raises:
        DatasetError: a last word has no tokens or more than ``max_length``, or there are no documents.
        CheckpointError: the tokenizer has neither bos nor eos for an empty context.

    Source: lm-eval 0.4.13, ``TemplateLM.loglikelihood``.
    """
    if not documents:
        raise DatasetError("last word: got no documents, expected at least one")
    splits = [last_word_split(text) for text in documents]
    wholes = _encode(tokenizer, [context + continuation for context, continuation in splits])
    contexts = _encode(tokenizer, [context for context, _ in splits])
    requests = []
    for number, (whole, context) in enumerate(zip(wholes, contexts, strict=True)):
        if not splits[number][0]:
            whole, context = _with_prefix(tokenizer, splits[number][1])
        scored = len(whole) - len(context)
        if not 1 <= scored <= max_length:
            raise DatasetError(
                f"document {number}: last word has {max(scored, 0)} tokens, expected 1 to {max_length}",
                hint="end every text with a word of its own",
            )
        requests.append(ScoreRequest(tuple(whole), scored))
    return requests


def request_batches(
    requests: Sequence[ScoreRequest], *, batch_size: int, max_length: int = MAX_LENGTH
) -> list[Batch]:
    """Requests in the order in which lm-eval runs them: longest first, identical inputs once.

    Args:
        requests: at least one.
        batch_size: inputs a batch; it changes the last bits of the scores.
        max_length: longest input in tokens; a longer context loses its beginning.

    Raises:
        UsageError: ``batch_size`` or ``max_length`` is less than 1.

    Source: lm-eval 0.4.13, ``HFLM._loglikelihood_tokens`` and ``lm_eval.models.utils.Collator``.
    """
    require_positive(batch_size=batch_size, max_length=max_length)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.tokens[:-1], []).append(number)

    def order(group: list[int]) -> tuple[int, tuple[int, ...]]:
        # The longest continuation of a group speaks for it.
        first = max((requests[number] for number in group), key=lambda request: request.scored)
        return -len(first.tokens), first.tokens

    ordered = sorted(groups.values(), key=order)
    return [
        _batch(requests, ordered[start : start + batch_size], max_length)
        for start in range(0, len(ordered), batch_size)
    ]


def window_batches(windows: torch.Tensor, *, batch_size: int) -> list[Batch]:
    """Windows in their order; the first token of each is context only.

    Args:
        windows: (n, seqlen) int64, seqlen >= 2.
        batch_size: windows a batch.

    Raises:
        ShapeError: there are no windows, or they have fewer than two tokens.
        UsageError: ``batch_size`` is less than 1.
    """
    require_positive(batch_size=batch_size)
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ShapeError(
            f"windows: got shape {tuple(windows.shape)}, expected (n, seqlen) with n >= 1 and seqlen >= 2"
        )
    batches = []
    scored = windows.shape[1] - 1
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        batches.append(
            Batch(
                ids=part,
                rows=torch.arange(len(part)).repeat_interleave(scored),
                positions=torch.arange(scored).repeat(len(part)),
                targets=part[:, 1:].flatten(),
                documents=tuple(range(start, start + len(part))),
                tokens=(scored,) * len(part),
            )
        )
    return batches


def require_positive(**values: int) -> None:
    """Refuse option values below 1.

    Raises:
        UsageError: one is; the message names its option.
    """
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}`: got {value}, expected at least 1")


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids with the default special tokens, but for texts that spell out the first of them, as in lm-eval."""
    if not tokenizer.adds_special_tokens or tokenizer.prefix_id is None:
        return tokenizer.encode_batch(texts)
    prefix = tokenizer.decode([tokenizer.prefix_id], skip_special_tokens=False)
    return [tokenizer.encode(text, special_tokens=not text.startswith(prefix)) for text in texts]


def _with_prefix(tokenizer: Tokenizer, continuation: str) -> tuple[list[int], list[int]]:
    """Whole and context where there is no context: bos, or else eos, stands in for it."""
    if tokenizer.prefix_id is None:
        raise CheckpointError("tokenizer: got neither bos nor eos token, expected one for an empty context")
    ids = tokenizer.encode(continuation, special_tokens=False)
    if ids[:1] != [tokenizer.prefix_id]:
        ids = [tokenizer.prefix_id, *ids]
    return ids, ids[:1]


def _batch(requests: Sequence[ScoreRequest], groups: Sequence[list[int]], max_length: int) -> Batch:
    """The requests of one batch; those of a group share one input."""
    inputs = [requests[group[0]].tokens[-(max_length + 1) : -1] for group in groups]
    ids = torch.full((len(inputs), max(map(len, inputs))), _PADDING_ID, dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, (tokens, group) in enumerate(zip(inputs, groups, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        for number in group:
            request = requests[number]
            rows += [row] * request.scored
            positions += range(len(tokens) - request.scored, len(tokens))
            targets += request.tokens[-request.scored :]
    documents = tuple(number for group in groups for number in group)
    return Batch(
        ids=ids,
        rows=torch.tensor(rows),
        positions=torch.tensor(positions),
        targets=torch.tensor(targets),
        documents=documents,
        tokens=tuple(requests[number].scored for number in documents),
    )
