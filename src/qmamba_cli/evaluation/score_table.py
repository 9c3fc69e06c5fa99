"""The scores of several models on the same documents, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.evaluation.batches import Batch
from qmamba_cli.evaluation.scoring import LastWordScore, PerplexityScore, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreTable:
    """r models on n documents (windows) with t scored tokens in all.

    Attributes:
        documents: (n,) int64, index of each document, in the order of the columns.
        tokens: (n,) int64, scored tokens of each; they sum to t.
        ll: (r, t) float32, log-likelihood of each token in nats.
        correct: (r, t) bool, whether it is the model's first choice.
        document_ll: (r, n) float32, log-likelihood of each document, added as the scorer adds.
        kl: (r, t) float64, KL divergence reference ‖ model in nats, or None without a reference.
        agrees: (r, t) bool, whether both have the same first choice, or None without a reference.
    """

    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    ll: NDArray[np.float32]
    correct: NDArray[np.bool_]
    document_ll: NDArray[np.float32]
    kl: NDArray[np.float64] | None = None
    agrees: NDArray[np.bool_] | None = None

    @classmethod
    def of_batch(cls, batch: Batch, scores: Sequence[TokenScores]) -> "ScoreTable":
        """The table of one batch.

        Args:
            batch: what was scored.
            scores: one entry a model, from `score_batch`.
        """
        kl = [score.kl for score in scores if score.kl is not None]
        agrees = [score.agrees for score in scores if score.agrees is not None]
        return cls(
            documents=np.array(batch.documents, dtype=np.int64),
            tokens=np.array(batch.tokens, dtype=np.int64),
            ll=_stacked([score.ll for score in scores]),
            correct=_stacked([score.correct for score in scores]),
            document_ll=_stacked([score.by_document(batch)[0] for score in scores]),
            kl=_stacked(kl) if kl else None,
            agrees=_stacked(agrees) if agrees else None,
        )

    @classmethod
    def joined(cls, tables: Sequence["ScoreTable"]) -> "ScoreTable":
        """Several tables of the same models side by side, with the documents in the order of their index."""
        arrays = {
            name: np.concatenate([table.arrays()[name] for table in tables], axis=-1)
            for name in tables[0].arrays()
        }
        order = np.argsort(arrays["documents"], kind="stable")
        starts = np.cumsum(arrays["tokens"]) - arrays["tokens"]
        places = [np.arange(starts[i], starts[i] + arrays["tokens"][i]) for i in order]
        of_tokens = np.concatenate(places)
        per_document = {"documents", "tokens", "document_ll"}
        return cls.from_arrays(
            {name: array[..., order if name in per_document else of_tokens] for name, array in arrays.items()}
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Name → array of everything that is there, as `from_arrays` takes it."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: array for name, array in found.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "ScoreTable":
        """Inverse of `arrays`."""
        return cls(**arrays)

    def by_document(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over the tokens of each document, in float64: (..., t) to (..., n)."""
        starts = np.cumsum(self.tokens) - self.tokens
        sums: NDArray[np.float64] = np.add.reduceat(values.astype(np.float64), starts, axis=-1)
        return sums

    def greedy(self, row: int) -> NDArray[np.bool_]:
        """(n,) whether every token of a document is the model's first choice."""
        starts = np.cumsum(self.tokens) - self.tokens
        every: NDArray[np.bool_] = np.logical_and.reduceat(self.correct[row], starts)
        return every

    def last_words(self, row: int, texts: Sequence[str]) -> list[LastWordScore]:
        """One model's scores as `scoring.score_last_word` gives them, of the documents that are here.

        Args:
            row: the model.
            texts: every document by its index.
        """
        columns = zip(self.documents, self.document_ll[row], self.greedy(row), self.tokens, strict=True)
        return [
            LastWordScore(
                doc_id=int(document),
                target=" " + texts[document].split(" ")[-1],
                ll=float(ll),
                greedy=bool(greedy),
                tokens=int(tokens),
            )
            for document, ll, greedy, tokens in columns
        ]

    def running_text(self, row: int) -> PerplexityScore:
        """One model's scores as `scoring.score_perplexity` gives them; every document has as many tokens."""
        shape = (len(self.documents), -1)
        return PerplexityScore(
            nll=-self.ll[row].astype(np.float64).reshape(shape),
            correct=self.correct[row].reshape(shape),
            kl=None if self.kl is None else self.kl[row].reshape(shape),
            agrees=None if self.agrees is None else self.agrees[row].reshape(shape),
        )

    def identical(self, a: int, b: int) -> bool:
        """Whether two models have the same bits in every score."""
        return all(
            array[a].tobytes() == array[b].tobytes()
            for array in (self.ll, self.correct, self.document_ll, self.kl, self.agrees)
            if array is not None
        )


def _stacked(tensors: Sequence[torch.Tensor]) -> NDArray[Any]:
    stacked: NDArray[Any] = torch.stack([tensor.cpu() for tensor in tensors]).numpy()
    return stacked
