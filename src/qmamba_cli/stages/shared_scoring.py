"""Scoring on several processes: whole batches are split, so every score has the bits of a single process."""

from collections.abc import Sequence

import numpy as np
from safetensors.numpy import load, save

from qmamba_cli.evaluation.batches import Batch
from qmamba_cli.evaluation.score_table import ScoreTable
from qmamba_cli.evaluation.scoring import LanguageModel, require_vocabulary, score_batch
from qmamba_cli.progress import Progress
from qmamba_cli.stages.distributed import Group
from qmamba_cli.stages.partial import documents_of


def shared_table(
    group: Group,
    models: Sequence[LanguageModel],
    batches: Sequence[Batch],
    *,
    reference: int | None,
    description: str,
    progress: Progress,
) -> ScoreTable:
    """The table of `score_tables.score_table` on the processes of ``group``; each gets all of it.

    Raises:
        CheckpointError: the batches hold ids that the models do not have.
        QmambaError: another process failed.
    """
    require_vocabulary(models[-1], batches)
    # In turns, since the batches of last words begin with the longest.
    mine = batches[group.world.rank :: group.world.size]
    parts: list[ScoreTable] = []
    with progress(description, documents_of(mine)) as advance:
        for batch in mine:
            parts.append(ScoreTable.of_batch(batch, score_batch(models, batch, reference=reference)))
            advance(len(batch.documents))
            group.check()
    # A process without batches has no arrays.
    arrays = ScoreTable.joined(parts).arrays() if parts else {}
    shared = group.share(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    return ScoreTable.joined([ScoreTable.from_arrays(found) for found in map(load, shared) if found])
