"""How far models part from the float model on the same tokens, with intervals over whole documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.evaluation.batches import Batch
from qmamba_cli.evaluation.scoring import LanguageModel, score_batch
from qmamba_cli.progress import Advance

RESAMPLES = 2000
"""Bootstrap resamples of the documents behind each interval."""

CONFIDENCE = 0.95
"""Coverage of the intervals."""

_SEED = 0
# Elements of the matrix of resampling weights held at once: 8 MB.
_BLOCK = 1 << 20
# Models scored side by side: the float model's head is applied once for them all.
_SIDE_BY_SIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """How a model's predictions differ from the float model's, document by document.

    Attributes:
        kl: (n,) float64, KL divergence float ‖ quantized in nats, summed over the document's scored tokens.
        delta_ll: (n,) float64, log-likelihood less the float model's, in nats, summed likewise.
        tokens: (n,) int64, scored tokens.
    """

    kl: NDArray[np.float64]
    delta_ll: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence, nats a token."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def delta_ll_mean(self) -> float:
        """Mean change of the log-likelihood, nats a token; negative is worse."""
        return float(self.delta_ll.sum() / self.tokens.sum())

    @property
    def kl_interval(self) -> tuple[float, float] | None:
        """95 % interval of `kl_mean`, from `interval`."""
        return interval(self.kl, self.tokens)


@dataclass(slots=True, kw_only=True, eq=False)
class Tally:
    """What `compare_with_float` has added up, as far as it has come.

    Attributes:
        sums: (m, 2, n) float64, KL divergence and change of the log-likelihood, of each model on each
            document.
        tokens: (n,) int64, scored tokens of each document.
        done: finished steps; a step is some models on one batch, batch after batch.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]
    done: int = 0

    @classmethod
    def empty(cls, models: int, batches: Sequence[Batch]) -> "Tally":
        """Nothing added up yet."""
        tokens = np.zeros(sum(len(batch.documents) for batch in batches), dtype=np.int64)
        for batch in batches:
            tokens[list(batch.documents)] = batch.tokens
        return cls(sums=np.zeros((models, 2, len(tokens))), tokens=tokens)

    @property
    def models(self) -> int:
        """Number of models."""
        return len(self.sums)

    @property
    def _steps(self) -> int:
        """Steps of a batch."""
        return -(-self.models // _SIDE_BY_SIDE)

    @property
    def units(self) -> int:
        """How often a model has read a batch."""
        whole, rest = divmod(self.done, self._steps)
        return whole * self.models + rest * _SIDE_BY_SIDE

    def outcomes(self, batches: Sequence[Batch]) -> list[Outcome | None]:
        """One entry a model, all over the same documents: those of the batches that every model has read.

        Where there is no such batch yet they are the first one's, and None stands for each model that has not
        read it.
        """
        whole, rest = divmod(self.done, self._steps)
        read = self.models if whole else rest * _SIDE_BY_SIDE
        chosen = sorted(document for batch in batches[: max(whole, 1)] for document in batch.documents)
        tokens = self.tokens[chosen]
        return [
            Outcome(kl=kl[chosen], delta_ll=gained[chosen], tokens=tokens) if number < read else None
            for number, (kl, gained) in enumerate(self.sums)
        ]


def compare_with_float(
    baseline: LanguageModel,
    models: Sequence[LanguageModel],
    batches: Sequence[Batch],
    *,
    tally: Tally | None = None,
    advance: Advance = lambda _units: None,
) -> list[Outcome]:
    """Run the same tokens through the float model and through each of the others.

    Args:
        baseline: the float model.
        models: the others; they share its vocabulary.
        batches: from `batches.window_batches` or `batches.request_batches`.
        tally: of an earlier run of the same that was interrupted, to go on with; what is measured is added to
            it, so that an interrupt leaves it valid.
        advance: called with the number of models that have finished a batch.

    Returns:
        One entry a model.
    """
    tally = Tally.empty(len(models), batches) if tally is None else tally
    starts = range(0, len(models), _SIDE_BY_SIDE)
    finished = tally.done
    for index, batch in enumerate(batches):
        places = list(batch.documents)
        remembered = _Remembered(baseline)
        for step, start in enumerate(starts, index * len(starts)):
            if step < finished:
                continue
            group = models[start : start + _SIDE_BY_SIDE]
            expected, *scores = score_batch([remembered, *group], batch, reference=0)
            for number, score in enumerate(scores, start):
                assert score.kl is not None
                gained = score.ll.double() - expected.ll.double()
                for row, values in enumerate((score.kl, gained)):
                    pieces = torch.split(values.cpu(), list(batch.tokens))
                    tally.sums[number, row, places] = [float(piece.sum()) for piece in pieces]
            tally.done = step + 1
            advance(len(group))
    return [outcome for outcome in tally.outcomes(batches) if outcome is not None]


class _Remembered:
    """A model that keeps what it computed for the one batch it is asked about again and again."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._hidden: torch.Tensor | None = None

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        if self._hidden is None:
            self._hidden = self._model.hidden(ids)
        return self._hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)


def interval(
    values: NDArray[np.float64], tokens: NDArray[np.int64], *, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The one interval of `intervals`: ``values`` (n,) float64."""
    return intervals([values], tokens, resamples=resamples)[0]


def intervals(
    columns: Sequence[NDArray[np.float64]], tokens: NDArray[np.int64], *, resamples: int = RESAMPLES
) -> list[tuple[float, float] | None]:
    """95 % intervals of Σ values / Σ tokens: percentiles of a bootstrap over whole documents.

    Documents are drawn, not tokens: those of one document share a context and are not independent. The seed
    is fixed, so the same scores give the same interval, and all columns are drawn alike.

    Args:
        columns: each (n,) float64, one sum a document.
        tokens: (n,) int64, tokens behind each sum.
        resamples: number of resamples.

    Returns:
        For each column the lower and upper end, or None where there are fewer than two documents or a value
        is not finite.
    """
    n = len(tokens)
    finite = [n > 1 and bool(np.isfinite(column).all()) for column in columns]
    if not any(finite):
        return [None for _ in columns]
    values = np.stack([column for column, sound in zip(columns, finite, strict=True) if sound], axis=1)
    random = np.random.default_rng(_SEED)
    means: list[NDArray[np.float64]] = []
    for start in range(0, resamples, max(1, _BLOCK // n)):
        draws = min(max(1, _BLOCK // n), resamples - start)
        weights = random.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
        means.append((weights @ values) / (weights @ tokens.astype(np.float64))[:, None])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    ends = iter(zip(low.tolist(), high.tolist(), strict=True))
    return [next(ends) if sound else None for sound in finite]
