"""Scoring on several processes: whole batches are split, so every score has the bits of a single process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from qmamba_cli.evaluation.batches import Batch, last_word_requests, request_batches, window_batches
from qmamba_cli.evaluation.scoring import (
    LanguageModel,
    LastWordScore,
    PerplexityScore,
    require_baseline,
    require_vocabulary,
    score_batch,
    score_last_word,
    score_perplexity,
)
from qmamba_cli.progress import Progress, silent
from qmamba_cli.stages.distributed import Group
from qmamba_cli.tokenizer import Tokenizer


def shared_last_word(
    group: Group,
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    batch_size: int,
    progress: Progress = silent,
) -> list[LastWordScore]:
    """`evaluation.scoring.score_last_word` on the processes of ``group``; each gets all of it.

    Raises:
        QmambaError: as there, or another process failed.
    """
    if group.world.size == 1:
        return score_last_word(model, tokenizer, documents, batch_size=batch_size, progress=progress)
    requests = last_word_requests(tokenizer, documents)
    batches = request_batches(requests, batch_size=batch_size)
    require_vocabulary(model, batches)
    rows: dict[str, list[NDArray[Any]]] = {"document": [], "ll": [], "greedy": []}
    mine = _mine(group, batches)
    with progress("scoring last words", sum(len(batch.documents) for batch in mine)) as advance:
        for batch in mine:
            lls, greedy = score_batch([model], batch)[0].by_document(batch)
            rows["document"].append(np.array(batch.documents))
            rows["ll"].append(lls.cpu().numpy())
            rows["greedy"].append(greedy.cpu().numpy())
            advance(len(batch.documents))
            group.check()
    found = _shared(group, rows)
    scores: list[LastWordScore] = []
    for doc_id, place in enumerate(np.argsort(found["document"], kind="stable").tolist()):
        scores.append(
            LastWordScore(
                doc_id=doc_id,
                target=" " + documents[doc_id].split(" ")[-1],
                ll=found["ll"][place].item(),
                greedy=found["greedy"][place].item(),
                tokens=requests[doc_id].scored,
            )
        )
    return scores


def shared_perplexity(
    group: Group,
    model: LanguageModel,
    windows: torch.Tensor,
    *,
    baseline: LanguageModel | None = None,
    batch_size: int,
    progress: Progress = silent,
) -> PerplexityScore:
    """`evaluation.scoring.score_perplexity` on the processes of ``group``; each gets all of it.

    Raises:
        QmambaError: as there, or another process failed.
    """
    if group.world.size == 1:
        return score_perplexity(model, windows, baseline=baseline, batch_size=batch_size, progress=progress)
    batches = window_batches(windows, batch_size=batch_size)
    require_vocabulary(model, batches)
    require_baseline(model, baseline)
    models, reference = ([model], None) if baseline is None else ([baseline, model], 0)
    compared = ("kl", "agrees") if baseline is not None else ()
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in ("document", "ll", "correct", *compared)}
    mine = _mine(group, batches)
    with progress("scoring windows", sum(len(batch.documents) for batch in mine)) as advance:
        for batch in mine:
            score = score_batch(models, batch, reference=reference)[-1]
            rows["document"].append(np.array(batch.documents))
            for name in ("ll", "correct", *compared):
                rows[name].append(getattr(score, name).cpu().numpy().reshape(len(batch.documents), -1))
            advance(len(batch.documents))
            group.check()
    found = _shared(group, rows)
    order = np.argsort(found["document"], kind="stable")
    return PerplexityScore(
        nll=-found["ll"][order].astype(np.float64),
        correct=found["correct"][order],
        kl=found["kl"][order] if compared else None,
        agrees=found["agrees"][order] if compared else None,
    )


def _mine(group: Group, batches: Sequence[Batch]) -> Sequence[Batch]:
    # In turns, since the batches of last words begin with the longest.
    return batches[group.world.rank :: group.world.size]


def _shared(group: Group, rows: dict[str, list[NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Everyone's rows under each other; a process without batches has none."""
    mine = {name: np.ascontiguousarray(np.concatenate(parts)) for name, parts in rows.items() if parts}
    parts = [found for found in map(load, group.share(save(mine))) if found]
    return {name: np.concatenate([part[name] for part in parts]) for name in rows}
