"""Log-likelihoods of last words and of running text under a model.

The head is applied only to the positions that are scored, a bounded number of them at a time, so that memory
does not grow with the vocabulary times the length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from numpy.typing import NDArray

from qmamba_cli.errors import CheckpointError, DatasetError, ShapeError, UsageError
from qmamba_cli.evaluation.documents import last_word_split
from qmamba_cli.progress import Progress, silent
from qmamba_cli.tokenizer import Tokenizer

MAX_LENGTH = 2048
"""Longest input in tokens; a longer context loses its beginning."""

# Logits held at once: 32 MB of float32.
_LOGITS_BLOCK = 1 << 23
# Right padding never reaches a scored position of a causal model; lm-eval pads with the same id.
_PADDING_ID = 0


class LanguageModel(Protocol):
    """What scoring asks of a model."""

    @property
    def vocab_size(self) -> int:
        """Number of logits, padding of the vocabulary included."""

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head reads: (b, l) int64 on the CPU to (b, l, d_model), on the model's device."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits: (..., d_model) to (..., vocab_size) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWordScore:
    """How a model did on one document.

    Attributes:
        doc_id: position of the document.
        target: a space and the last word.
        ll: log-likelihood of the continuation in nats.
        greedy: whether every token of the continuation is the model's first choice.
        tokens: tokens of the continuation.
    """

    doc_id: int
    target: str
    ll: float
    greedy: bool
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PerplexityScore:
    """How a model did on running text, token by token.

    Attributes:
        nll: (windows, seqlen - 1) float64, negative log-likelihood in nats.
        correct: (windows, seqlen - 1) bool, whether the token is the model's first choice.
        kl: (windows, seqlen - 1) float64, KL divergence baseline ‖ model in nats, or None.
        agrees: (windows, seqlen - 1) bool, whether both models have the same first choice, or None.
    """

    nll: NDArray[np.float64]
    correct: NDArray[np.bool_]
    kl: NDArray[np.float64] | None = None
    agrees: NDArray[np.bool_] | None = None

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return self.nll.size

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood; inf where that overflows."""
        try:
            return math.exp(self.nll.mean())
        except OverflowError:
            return math.inf

    @property
    def bits_per_token(self) -> float:
        """Mean negative log-likelihood in bits."""
        return float(self.nll.mean()) / math.log(2)

    @property
    def top1_acc(self) -> float:
        """Share of tokens that are the model's first choice."""
        return float(self.correct.mean())

    @property
    def kl_mean(self) -> float | None:
        """Mean KL divergence in nats a token, or None without a baseline."""
        return None if self.kl is None else float(self.kl.mean())

    @property
    def same_top1(self) -> float | None:
        """Share of positions with the same first choice as the baseline, or None without one."""
        return None if self.agrees is None else float(self.agrees.mean())


@dataclass(frozen=True, slots=True)
class _Request:
    """One document as tokens: the last ``scored`` of them are the continuation."""

    doc_id: int
    target: str
    tokens: tuple[int, ...]
    scored: int


@torch.inference_mode()
def score_last_word(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    batch_size: int,
    max_length: int = MAX_LENGTH,
    progress: Progress = silent,
) -> list[LastWordScore]:
    """Score the last word of each document as lm-eval scores lambada_openai.

    Context and continuation are tokenized together and parted behind the tokens of the context alone, with
    the tokenizer's default special tokens. Documents run longest first, padded on the right, so that batches
    and therefore roundings are lm-eval's; identical inputs run once.

        ll = sum over the continuation of log_softmax(logits)[token]      (float32)

    Args:
        model: the model.
        tokenizer: its tokenizer.
        documents: texts, split by `last_word_split`.
        batch_size: documents a batch; it changes the last bits of ll.
        max_length: longest input in tokens; a longer context loses its beginning.
        progress: told of each finished document.

    Returns:
        One score a document, in the order of the documents.

    Raises:
        DatasetError: a last word has no tokens or more than ``max_length``, or there are no documents.
        CheckpointError: the tokenizer has neither bos nor eos for an empty context, or ids that the model
            does not have.
        UsageError: ``batch_size`` or ``max_length`` is less than 1.

    Source: lm-eval 0.4.13, ``TemplateLM.loglikelihood`` and ``HFLM._loglikelihood_tokens``.
    """
    _require_positive(batch_size=batch_size, max_length=max_length)
    if not documents:
        raise DatasetError("last word: got no documents, expected at least one")
    requests = _requests(tokenizer, documents, max_length)
    _require_vocabulary(model, max(max(request.tokens) for request in requests))
    groups: dict[tuple[int, ...], list[_Request]] = {}
    for request in requests:
        groups.setdefault(request.tokens[:-1], []).append(request)
    ordered = sorted(groups.values(), key=_batch_order)
    scores: list[LastWordScore] = []
    with progress("scoring last words", len(documents)) as advance:
        for start in range(0, len(ordered), batch_size):
            batch = _score_batch(model, ordered[start : start + batch_size], max_length)
            scores += batch
            advance(len(batch))
    return sorted(scores, key=lambda score: score.doc_id)


def _requests(tokenizer: Tokenizer, documents: Sequence[str], max_length: int) -> list[_Request]:
    splits = [last_word_split(text) for text in documents]
    wholes = _encode(tokenizer, [context + continuation for context, continuation in splits])
    contexts = _encode(tokenizer, [context for context, _ in splits])
    requests = []
    for doc_id, (text, whole, context) in enumerate(zip(documents, wholes, contexts, strict=True)):
        if not splits[doc_id][0]:
            whole, context = _with_prefix(tokenizer, splits[doc_id][1])
        scored = len(whole) - len(context)
        if not 1 <= scored <= max_length:
            raise DatasetError(
                f"document {doc_id}: last word has {max(scored, 0)} tokens, expected 1 to {max_length}",
                hint="end every text with a word of its own",
            )
        requests.append(_Request(doc_id, " " + text.split(" ")[-1], tuple(whole), scored))
    return requests


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


def _batch_order(group: list[_Request]) -> tuple[int, tuple[int, ...]]:
    """lm-eval's order: longest first, then by ids; the longest continuation of a group speaks for it."""
    first = max(group, key=lambda request: request.scored)
    return -len(first.tokens), first.tokens


def _score_batch(
    model: LanguageModel, groups: Sequence[list[_Request]], max_length: int
) -> list[LastWordScore]:
    """Scores of the requests of a batch; the requests of a group share one input."""
    inputs = [group[0].tokens[-(max_length + 1) : -1] for group in groups]
    ids = torch.full((len(inputs), max(map(len, inputs))), _PADDING_ID, dtype=torch.int64)
    for row, tokens in enumerate(inputs):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, group in enumerate(groups):
        length = len(inputs[row])
        for request in group:
            rows += [row] * request.scored
            positions += range(length - request.scored, length)
            targets += request.tokens[-request.scored :]
    hidden = model.hidden(ids)
    hidden = hidden[torch.tensor(rows, device=hidden.device), torch.tensor(positions, device=hidden.device)]
    target = torch.tensor(targets, device=hidden.device)
    pieces, first_choices = [], []
    for block in _blocks(len(target), model.vocab_size):
        log_probs = F.log_softmax(model.logits(hidden[block]), dim=-1)
        pieces.append(log_probs.gather(-1, target[block, None]).squeeze(-1))
        first_choices.append(log_probs.argmax(dim=-1) == target[block])
    requests = [request for group in groups for request in group]
    sizes = [request.scored for request in requests]
    lls = torch.stack([piece.sum() for piece in torch.split(torch.cat(pieces), sizes)]).tolist()
    greedy = torch.stack([piece.all() for piece in torch.split(torch.cat(first_choices), sizes)]).tolist()
    return [
        LastWordScore(doc_id=request.doc_id, target=request.target, ll=ll, greedy=hit, tokens=request.scored)
        for request, ll, hit in zip(requests, lls, greedy, strict=True)
    ]


@torch.inference_mode()
def score_perplexity(
    model: LanguageModel,
    windows: torch.Tensor,
    *,
    baseline: LanguageModel | None = None,
    batch_size: int,
    progress: Progress = silent,
) -> PerplexityScore:
    """Score running text; the first token of each window is context only.

        nll = -log_softmax(logits)[token]                     (float32)
        kl  = sum over the vocabulary of p (log p - log q)    (log-softmax float32, sum float64)

    with p of the baseline and q of the model.

    Args:
        model: the model.
        windows: (n, seqlen) int64, as from `documents.perplexity_windows`, seqlen >= 2.
        baseline: the model to compare with, or None.
        batch_size: windows a batch.
        progress: told of each finished window.

    Returns:
        The scores of n * (seqlen - 1) tokens.

    Raises:
        CheckpointError: the windows hold ids that the model does not have, or the baseline has another
            vocabulary.
        ShapeError: there are no windows, or they have fewer than two tokens.
        UsageError: ``batch_size`` is less than 1.
    """
    _require_positive(batch_size=batch_size)
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ShapeError(
            f"windows: got shape {tuple(windows.shape)}, expected (n, seqlen) with n >= 1 and seqlen >= 2"
        )
    _require_vocabulary(model, int(windows.max()))
    if baseline is not None and baseline.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"baseline: got a vocabulary of {baseline.vocab_size}, expected the model's {model.vocab_size}",
            hint="name the float model that the quantized one was made from",
        )
    columns: list[list[NDArray[np.float64]]] = [[], [], [], []]
    with progress("scoring windows", len(windows)) as advance:
        for batch in torch.split(windows, batch_size):
            for column, values in zip(columns, _score_windows(model, baseline, batch), strict=True):
                column.append(values)
            advance(len(batch))
    nll, correct, kl, agrees = (np.concatenate(column) for column in columns)
    compared = baseline is not None
    return PerplexityScore(
        nll=nll,
        correct=correct.astype(np.bool_),
        kl=kl if compared else None,
        agrees=agrees.astype(np.bool_) if compared else None,
    )


def _score_windows(
    model: LanguageModel, baseline: LanguageModel | None, batch: torch.Tensor
) -> list[NDArray[np.float64]]:
    """nll, correct, kl and agrees, each (b, seqlen - 1) float64; without a baseline the last two are 0."""
    hidden = model.hidden(batch)[:, :-1].flatten(0, 1)
    reference = None if baseline is None else baseline.hidden(batch)[:, :-1].flatten(0, 1)
    target = batch[:, 1:].flatten().to(hidden.device)
    out = torch.zeros((4, len(target)), dtype=torch.float64)
    for block in _blocks(len(target), model.vocab_size):
        log_q = F.log_softmax(model.logits(hidden[block]), dim=-1)
        first_choice = log_q.argmax(dim=-1)
        out[0, block] = -log_q.gather(-1, target[block, None]).squeeze(-1).double().cpu()
        out[1, block] = (first_choice == target[block]).double().cpu()
        if baseline is not None and reference is not None:
            log_p = F.log_softmax(baseline.logits(reference[block]), dim=-1)
            out[2, block] = (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64).cpu()
            out[3, block] = (log_p.argmax(dim=-1) == first_choice).double().cpu()
    shaped = out.view(4, len(batch), -1).numpy()
    return list(shaped)


def _blocks(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of ``range(rows)`` whose logits fit the budget."""
    step = max(1, _LOGITS_BLOCK // vocab_size)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}`: got {value}, expected at least 1")


def _require_vocabulary(model: LanguageModel, largest_id: int) -> None:
    if largest_id >= model.vocab_size:
        raise CheckpointError(
            f"tokenizer: got token id {largest_id}, expected ids below the model's vocabulary of "
            f"{model.vocab_size}",
            hint="use the tokenizer that belongs to the model",
        )
