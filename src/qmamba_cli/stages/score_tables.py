"""Batches under several models to one table of scores, which an interrupt leaves behind as far as it came."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from qmamba_cli.evaluation.batches import Batch
from qmamba_cli.evaluation.score_table import ScoreTable
from qmamba_cli.evaluation.scoring import LanguageModel, require_vocabulary, score_batch
from qmamba_cli.progress import Progress
from qmamba_cli.stages.partial import Arrays, Keeper, documents_of

_BOOLEAN = {"correct", "agrees"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What was scored.

    Attributes:
        table: the scores, documents in their order.
        partial: whether it was interrupted, so that only the first batches are in the table.
        done: batches in the table.
        keeper: where the scores go when what is made of them is interrupted, too, or None.
        fingerprint: of everything the scores depend on.
    """

    table: ScoreTable
    partial: bool
    done: int
    keeper: Keeper | None
    fingerprint: str

    def keep(self) -> None:
        """Write the scores for a command that goes on, where there is a place for them."""
        if self.keeper is not None:
            self.keeper.save(self.fingerprint, self.table.arrays(), self.done)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the scores if the block, which makes the result of them, is interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            self.keep()
            raise


def score_table(
    models: Sequence[LanguageModel],
    batches: Sequence[Batch],
    *,
    reference: int | None,
    keeper: Keeper | None,
    fingerprint: str,
    description: str,
    progress: Progress,
) -> Scored:
    """The scores of all batches, or of the first ones when it was interrupted.

    Args:
        models: rows of the table; they share a vocabulary.
        batches: at least one.
        reference: index of the model that the others are compared with, or None.
        keeper: where the scores go when it is interrupted, and come from when it goes on; with None an
            interrupt is raised.
        fingerprint: of everything the scores depend on.
        description: of the progress line.
        progress: told of each document under each model.

    Raises:
        KeyboardInterrupt: it was interrupted before the first batch was done, or has no keeper.
        CheckpointError: the batches hold ids that the models do not have.
        ArtifactError: what an interrupted command kept is damaged, or belongs to something else.
    """
    require_vocabulary(models[-1], batches)
    made = functools.partial(Scored, keeper=keeper, fingerprint=fingerprint)
    parts: list[ScoreTable] = []
    finished = 0
    kept = None if keeper is None else keeper.load(fingerprint)
    if keeper is not None and kept is not None:
        finished = kept[1]
        parts.append(_table(keeper, kept[0], len(models), batches[:finished]))
    try:
        with progress(description, documents_of(batches) * len(models)) as advance:
            advance(len(models) * documents_of(batches[:finished]))
            for batch in batches[finished:]:
                read = functools.partial(advance, len(batch.documents))
                scores = score_batch(models, batch, reference=reference, on_model=read)
                parts.append(ScoreTable.of_batch(batch, scores))
    except KeyboardInterrupt:
        if keeper is None or not parts:
            raise
        done = finished + len(parts) - (kept is not None)
        scored = made(table=ScoreTable.joined(parts), partial=True, done=done)
        scored.keep()
        return scored
    return made(table=ScoreTable.joined(parts), partial=False, done=len(batches))


def _table(keeper: Keeper, arrays: Arrays, models: int, batches: Sequence[Batch]) -> ScoreTable:
    """The table that was kept of these batches."""
    try:
        table = ScoreTable.from_arrays(
            {name: array.astype(np.bool_) if name in _BOOLEAN else array for name, array in arrays.items()}
        )
        documents = sorted(document for batch in batches for document in batch.documents)
        shape = (models, sum(sum(batch.tokens) for batch in batches))
        if table.documents.tolist() != documents or any(
            array is not None and array.shape != shape for array in (table.ll, table.correct, table.kl)
        ):
            raise ValueError("another shape")
    except (TypeError, ValueError, AttributeError) as error:
        raise keeper.damaged(error) from None
    return table
