"""Metrics of each model, and what separates every two of them, from one table of scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmamba_cli.evaluation import statistics
from qmamba_cli.evaluation.paired import (
    CONFIDENCE,
    Intervals,
    McNemar,
    bootstrap_ratios,
    holm,
    mcnemar,
    resamples_for,
)
from qmamba_cli.evaluation.score_table import ScoreTable
from qmamba_cli.evaluation.verdicts import Difference, Units, verdict
from qmamba_cli.progress import Progress, silent

# Divergences below it are rounding: float32 log-probabilities differ by about 1e-7.
_SMALLEST_KL = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """What the task makes of one model's scores.

    Attributes:
        lls: (n,) float64, log-likelihood of each document in nats, summed over its tokens.
        right: whether each answer is right, (n,) of documents or (t,) of tokens.
        kl: (n,) float64, KL divergence summed over the tokens of each document, or None.
        metrics: name → value, JSON's numbers.
    """

    lls: NDArray[np.float64]
    right: NDArray[np.bool_]
    kl: NDArray[np.float64] | None
    metrics: dict[str, Any]


def compare_scores(
    names: Sequence[str],
    table: ScoreTable,
    *,
    last_word: bool,
    reference: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Metrics of every model and a verdict on every pair.

    Models with the same bits in every score are one for the tests: they are tested once, and the correction
    for many comparisons counts them once.

    Args:
        names: of the rows of the table.
        table: the scores.
        last_word: whether an answer is a document, right when all its tokens are; else it is a token.
        reference: name of the row that KL is measured against, or None.
        seed: of the bootstrap.
        progress: told of each resample.

    Returns:
        ``modes`` (name → metrics), ``pairs`` and ``statistics`` (how the pairs were tested), JSON's types but
        for infinities and NaN.
    """
    rows = [_row(table, number, last_word) for number in range(len(names))]
    units = Units(
        documents=len(table.tokens),
        tokens=int(table.tokens.sum()),
        document="document" if last_word else "window",
        answer="document" if last_word else "token",
        reference=reference,
        above=_above(names, rows, reference),
    )
    leaders = _leaders(table)
    tested = [pair for pair in combinations(range(len(names)), 2) if all(leaders[i] == i for i in pair)]
    resamples = resamples_for(len(tested))
    differences = _differences(rows, table.tokens, tested, resamples, seed, progress)
    pairs = [_pair(names, a, b, differences, leaders, units) for a, b in combinations(range(len(names)), 2)]
    modes = {name: row.metrics for name, row in zip(names, rows, strict=True)}
    if reference is not None:
        _add_differences_to_reference(modes, pairs, reference)
    return {
        "modes": modes,
        "pairs": pairs,
        "statistics": {
            "confidence": CONFIDENCE,
            "unit": "nats a token",
            "interval": "BCa bootstrap, paired",
            "cluster": units.document,
            "resamples": resamples,
            "seed": seed,
            "accuracy_test": f"exact McNemar over {units.answer}s",
            "correction": "Holm, each measure by itself",
            "tests": len(tested),
        },
    }


def _above(names: Sequence[str], rows: Sequence[Row], reference: str | None) -> frozenset[str]:
    """Names of the models with a larger log-likelihood than the reference."""
    if reference is None:
        return frozenset()
    least = rows[names.index(reference)].lls.sum()
    return frozenset(name for name, row in zip(names, rows, strict=True) if row.lls.sum() > least)


def _row(table: ScoreTable, number: int, last_word: bool) -> Row:
    tokens = int(table.tokens.sum())
    correct = table.correct[number]
    if last_word:
        right = table.greedy(number)
        lls = [float(ll) for ll in table.document_ll[number]]
        acc = statistics.mean([int(hit) for hit in right])
        acc_stderr = statistics.mean_stderr([int(hit) for hit in right])
        perplexity = statistics.perplexity(lls)
    else:
        right = correct
        acc = float(correct.mean())
        # Tokens of a window depend on each other, so that the windows are what varies.
        acc_stderr = statistics.mean_stderr((table.by_document(correct) / table.tokens).tolist())
        perplexity = statistics.perplexity([float(table.ll[number].astype(np.float64).mean())])
    ll = float(table.ll[number].astype(np.float64).mean())
    metrics: dict[str, Any] = {
        "acc": acc,
        "acc_stderr": acc_stderr,
        "perplexity": perplexity,
        "bits_per_token": -ll / math.log(2),
        "ll_per_token": ll,
        "tokens": tokens,
    }
    kl = None
    if table.kl is not None and table.agrees is not None:
        kl = table.by_document(table.kl[number])
        metrics |= _divergence(table.kl[number], table.agrees[number])
    return Row(lls=table.by_document(table.ll[number]), right=right, kl=kl, metrics=metrics)


def _divergence(kl: NDArray[np.float64], agrees: NDArray[np.bool_]) -> dict[str, float]:
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "same_top1": float(agrees.mean()),
    }


def _leaders(table: ScoreTable) -> list[int]:
    """For each row the first one with the same bits."""
    leaders: list[int] = []
    for row in range(len(table.ll)):
        leaders.append(
            next((lead for lead in sorted(set(leaders)) if table.identical(lead, row)), row),
        )
    return leaders


def _differences(
    rows: Sequence[Row],
    tokens: NDArray[np.int64],
    tested: Sequence[tuple[int, int]],
    resamples: int,
    seed: int,
    progress: Progress,
) -> dict[tuple[int, int], Difference]:
    """Every tested pair's difference a - b with its corrected p-values."""
    if not tested:
        return {}
    measures = {"ll": [rows[a].lls - rows[b].lls for a, b in tested]}
    kls = [(rows[a].kl, rows[b].kl) for a, b in tested]
    measures["kl"] = [a - b for a, b in kls if a is not None and b is not None]
    columns = [column for group in measures.values() for column in group]
    intervals = bootstrap_ratios(
        np.stack(columns, axis=1), tokens, resamples=resamples, seed=seed, progress=progress
    )
    accuracy = [mcnemar(rows[a].right, rows[b].right) for a, b in tested]
    corrected = {
        "accuracy": holm([test.p for test in accuracy]),
        "ll": holm(intervals.p_value[: len(tested)].tolist()),
        "kl": holm(intervals.p_value[len(tested) :].tolist()),
    }
    return {
        pair: _difference(number, accuracy[number], intervals, corrected, len(tested), bool(measures["kl"]))
        for number, pair in enumerate(tested)
    }


def _difference(
    number: int,
    accuracy: McNemar,
    intervals: Intervals,
    corrected: Mapping[str, Sequence[float]],
    tests: int,
    has_kl: bool,
) -> Difference:
    def interval(column: int) -> tuple[float, float]:
        return float(intervals.low[column]), float(intervals.high[column])

    second = number + tests
    return Difference(
        accuracy=accuracy,
        accuracy_p_corrected=corrected["accuracy"][number],
        ll=float(intervals.estimate[number]),
        ll_interval=interval(number),
        ll_p=float(intervals.p_value[number]),
        ll_p_corrected=corrected["ll"][number],
        kl=float(intervals.estimate[second]) if has_kl else None,
        kl_interval=interval(second) if has_kl else None,
        kl_p=float(intervals.p_value[second]) if has_kl else None,
        kl_p_corrected=corrected["kl"][number] if has_kl else None,
        tests=tests,
    )


def _pair(
    names: Sequence[str],
    a: int,
    b: int,
    differences: Mapping[tuple[int, int], Difference],
    leaders: Sequence[int],
    units: Units,
) -> dict[str, Any]:
    pair: dict[str, Any] = {"a": names[a], "b": names[b]}
    first, second = leaders[a], leaders[b]
    if first == second:
        found = None
        pair |= {"identical": True, "mcnemar_p": None, "delta_ll": 0.0, "delta_ll_ci": None}
    else:
        found = differences[min(first, second), max(first, second)]
        found = found if first < second else found.swapped()
        pair |= {
            "identical": False,
            "mcnemar_p": found.accuracy.p,
            "mcnemar_p_corrected": found.accuracy_p_corrected,
            "only_a": found.accuracy.only_a,
            "only_b": found.accuracy.only_b,
            "delta_ll": found.ll,
            "delta_ll_ci": _known(found.ll_interval),
            "delta_ll_p": found.ll_p,
            "delta_ll_p_corrected": found.ll_p_corrected,
        }
        if found.kl is not None and found.kl_interval is not None:
            pair |= {
                "delta_kl": found.kl,
                "delta_kl_ci": _known(found.kl_interval),
                "delta_kl_p": found.kl_p,
                "delta_kl_p_corrected": found.kl_p_corrected,
            }
    return {**pair, "verdict": verdict(names[a], names[b], found, units)}


def _known(interval: tuple[float, float]) -> list[float] | None:
    return None if any(map(math.isnan, interval)) else list(interval)


def _add_differences_to_reference(
    modes: Mapping[str, dict[str, Any]], pairs: Sequence[Mapping[str, Any]], reference: str
) -> None:
    """Each mode's difference to the reference, and the interval of its mean KL, the reference's being 0."""
    for pair in pairs:
        if reference not in (pair["a"], pair["b"]):
            continue
        first = pair["b"] == reference
        other = modes[pair["a"] if first else pair["b"]]
        sign = 1.0 if first else -1.0

        def turned(interval: list[float] | None, sign: float = sign) -> list[float] | None:
            return None if interval is None else sorted(sign * end for end in interval)

        other["delta_ll"] = sign * pair["delta_ll"]
        other["delta_ll_ci"] = turned(pair["delta_ll_ci"])
        other["kl_ci"] = turned(pair.get("delta_kl_ci"))


def chart_data(names: Sequence[str], table: ScoreTable, *, bins: int = 40) -> dict[str, Any]:
    """What a page draws beside the results: how the KL divergence of single tokens is distributed.

    Args:
        names: of the rows of the table.
        table: the scores, with a reference.
        bins: of the histogram, equally wide in the logarithm from 1e-6 nats to the largest value.

    Returns:
        ``kl_edges``, bins + 1 values in nats, and ``kl_counts``, name → tokens in each bin; what lies below
        the first edge counts in the first bin. Empty where there is no reference.
    """
    if table.kl is None:
        return {}
    finite = np.where(np.isfinite(table.kl), table.kl, _SMALLEST_KL)
    kl = np.maximum(finite, _SMALLEST_KL)
    edges = np.geomspace(_SMALLEST_KL, max(float(kl.max()), 10 * _SMALLEST_KL), bins + 1)
    # Rounding may leave the last edge just below the maximum.
    kl = np.minimum(kl, edges[-1])
    counts = {name: np.histogram(row, edges)[0].tolist() for name, row in zip(names, kl, strict=True)}
    return {"kl_edges": edges.tolist(), "kl_counts": counts}
