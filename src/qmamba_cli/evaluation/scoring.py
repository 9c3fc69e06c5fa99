"""Log-likelihoods of last words and of running text under one model or several.

The head is applied only to the positions that are scored, a bounded number of them at a time, so that memory
does not grow with the vocabulary times the length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from numpy.typing import NDArray

from qmamba_cli.errors import CheckpointError
from qmamba_cli.evaluation.batches import MAX_LENGTH as MAX_LENGTH
from qmamba_cli.evaluation.batches import Batch, last_word_requests, request_batches, window_batches
from qmamba_cli.evaluation.batches import ScoreRequest as ScoreRequest
from qmamba_cli.progress import Progress, silent
from qmamba_cli.tokenizer import Tokenizer

# Logits held at once: 32 MB of float32.
_LOGITS_BLOCK = 1 << 23


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenScores:
    """What one model made of the t scored tokens of a batch; tensors on the model's device.

    Attributes:
        ll: (t,) float32, log-likelihood in nats.
        correct: (t,) bool, whether the token is the model's first choice.
        kl: (t,) float64, KL divergence reference ‖ model in nats, or None without a reference.
        agrees: (t,) bool, whether both have the same first choice, or None without a reference.
    """

    ll: torch.Tensor
    correct: torch.Tensor
    kl: torch.Tensor | None = None
    agrees: torch.Tensor | None = None

    def by_document(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) float32 log-likelihood of each document of the batch, and (n,) bool whether all is correct."""
        lls = [piece.sum() for piece in torch.split(self.ll, list(batch.tokens))]
        greedy = [piece.all() for piece in torch.split(self.correct, list(batch.tokens))]
        return torch.stack(lls), torch.stack(greedy)


@torch.inference_mode()
def score_batch(
    models: Sequence[LanguageModel],
    batch: Batch,
    *,
    reference: int | None = None,
    on_model: Callable[[], None] = lambda: None,
) -> list[TokenScores]:
    """Score the same tokens under each model.

        ll = log_softmax(logits)[token]                       (float32)
        kl = sum over the vocabulary of p (log p - log q)     (log-softmax float32, sum float64)

    with p of the reference and q of the model. A model's ll do not depend on the models beside it.

    Args:
        models: at least one; they share a vocabulary.
        batch: from `request_batches` or `window_batches`.
        reference: index of the model that the others are compared with, or None.
        on_model: called when a model has read the batch, which is most of the work.

    Returns:
        One entry a model.
    """
    scored = []
    for model in models:
        scored.append(_scored_hidden(model, batch))
        on_model()
    parts: list[list[TokenScores]] = [[] for _ in models]
    for block in _blocks(len(batch.targets), models[0].vocab_size):
        target = batch.targets[block].to(scored[0].device)
        log_p = p = first_p = None
        if reference is not None:
            log_p = F.log_softmax(models[reference].logits(scored[reference][block]), dim=-1)
            p, first_p = log_p.exp(), log_p.argmax(dim=-1)
        for number, (model, hidden) in enumerate(zip(models, scored, strict=True)):
            if log_p is not None and number == reference:
                log_q = log_p
            else:
                log_q = F.log_softmax(model.logits(hidden[block]), dim=-1)
            first = log_q.argmax(dim=-1)
            kl = agrees = None
            if log_p is not None and p is not None and first_p is not None:
                kl = (p * (log_p - log_q)).sum(dim=-1, dtype=torch.float64)
                agrees = first.eq(first_p)
            ll = log_q.gather(-1, target[:, None]).squeeze(-1)
            parts[number].append(TokenScores(ll=ll, correct=first.eq(target), kl=kl, agrees=agrees))
    return [_joined(pieces) for pieces in parts]


def _scored_hidden(model: LanguageModel, batch: Batch) -> torch.Tensor:
    """(t, d_model): what the head reads at the scored positions."""
    hidden = model.hidden(batch.ids)
    return hidden[batch.rows.to(hidden.device), batch.positions.to(hidden.device)]


def _joined(pieces: Sequence[TokenScores]) -> TokenScores:
    compared = pieces[0].kl is not None
    return TokenScores(
        ll=torch.cat([piece.ll for piece in pieces]),
        correct=torch.cat([piece.correct for piece in pieces]),
        kl=torch.cat([piece.kl for piece in pieces if piece.kl is not None]) if compared else None,
        agrees=torch.cat([piece.agrees for piece in pieces if piece.agrees is not None])
        if compared
        else None,
    )


def score_requests(
    model: LanguageModel,
    requests: Sequence[ScoreRequest],
    *,
    batch_size: int,
    max_length: int = MAX_LENGTH,
    progress: Progress = silent,
) -> list[tuple[float, bool]]:
    """Score continuations as lm-eval does: longest first, right padding, identical inputs once.

        ll = sum over the continuation of log_softmax(logits)[token]      (float32)

    Args:
        model: the model.
        requests: tokens, and how many of them are scored.
        batch_size: inputs a batch; it changes the last bits of ll.
        max_length: longest input in tokens; a longer context loses its beginning.
        progress: told of each finished request.

    Returns:
        Log-likelihood in nats, and whether every scored token is the model's first choice, a request.

    Raises:
        CheckpointError: the requests hold ids that the model does not have.
        UsageError: ``batch_size`` or ``max_length`` is less than 1.

    Source: lm-eval 0.4.13, ``HFLM._loglikelihood_tokens``.
    """
    batches = request_batches(requests, batch_size=batch_size, max_length=max_length)
    require_vocabulary(model, batches)
    scores: dict[int, tuple[float, bool]] = {}
    with progress("scoring last words", len(requests)) as advance:
        for batch in batches:
            lls, greedy = score_batch([model], batch)[0].by_document(batch)
            scores |= zip(batch.documents, zip(lls.tolist(), greedy.tolist(), strict=True), strict=True)
            advance(len(batch.documents))
    return [scores[number] for number in range(len(requests))]


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
    the tokenizer's default special tokens; then as in `score_requests`.

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
    requests = last_word_requests(tokenizer, documents, max_length=max_length)
    scores = score_requests(model, requests, batch_size=batch_size, max_length=max_length, progress=progress)
    return [
        LastWordScore(
            doc_id=doc_id, target=" " + text.split(" ")[-1], ll=ll, greedy=greedy, tokens=request.scored
        )
        for doc_id, (text, request, (ll, greedy)) in enumerate(zip(documents, requests, scores, strict=True))
    ]


def score_perplexity(
    model: LanguageModel,
    windows: torch.Tensor,
    *,
    baseline: LanguageModel | None = None,
    batch_size: int,
    progress: Progress = silent,
) -> PerplexityScore:
    """Score running text; the first token of each window is context only.

    Args:
        model: the model.
        windows: (n, seqlen) int64, as from `documents.perplexity_windows`, seqlen >= 2.
        baseline: the model to compare with, or None; `score_batch` defines the divergence.
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
    batches = window_batches(windows, batch_size=batch_size)
    require_vocabulary(model, batches)
    require_baseline(model, baseline)
    compared = baseline is not None
    models = [model] if baseline is None else [baseline, model]
    scores = []
    with progress("scoring windows", len(windows)) as advance:
        for batch in batches:
            scores.append(score_batch(models, batch, reference=0 if compared else None)[-1])
            advance(len(batch.documents))
    joined = _joined(scores)
    shape = (len(windows), windows.shape[1] - 1)
    return PerplexityScore(
        nll=-joined.ll.double().cpu().numpy().reshape(shape),
        correct=joined.correct.cpu().numpy().reshape(shape),
        kl=None if joined.kl is None else joined.kl.cpu().numpy().reshape(shape),
        agrees=None if joined.agrees is None else joined.agrees.cpu().numpy().reshape(shape),
    )


def require_vocabulary(model: LanguageModel, batches: Sequence[Batch]) -> None:
    """Refuse batches with ids that the model does not have.

    Raises:
        CheckpointError: there are such ids; the message names the largest.
    """
    largest = max(batch.largest_id for batch in batches)
    if largest >= model.vocab_size:
        raise CheckpointError(
            f"tokenizer: got token id {largest}, expected ids below the model's vocabulary of "
            f"{model.vocab_size}",
            hint="use the tokenizer that belongs to the model",
        )


def require_baseline(model: LanguageModel, baseline: LanguageModel | None) -> None:
    """Refuse a baseline that has another vocabulary than the model.

    Raises:
        CheckpointError: it has.
    """
    if baseline is not None and baseline.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"baseline: got a vocabulary of {baseline.vocab_size}, expected the model's {model.vocab_size}",
            hint="name the float model that the quantized one was made from",
        )


def _blocks(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of ``range(rows)`` whose logits fit the budget."""
    step = max(1, _LOGITS_BLOCK // vocab_size)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
