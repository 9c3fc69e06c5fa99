"""The results file: keys, missing values, strict JSON."""

import json
import math
from typing import Any

import numpy as np
import pytest

from qmamba_cli.evaluation.results import (
    build_results,
    last_word_metrics,
    perplexity_metrics,
    run_config,
    sample_lines,
    to_json,
)
from qmamba_cli.evaluation.scoring import LastWordScore, PerplexityScore
from qmamba_cli.evaluation.tasks import TASKS


def scores(*lls: float) -> list[LastWordScore]:
    return [
        LastWordScore(doc_id=number, target=" é", ll=ll, greedy=number % 2 == 0, tokens=1)
        for number, ll in enumerate(lls)
    ]


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def results_of(metrics: dict[str, float | str], task: str = "lastword", **options: Any) -> dict[str, Any]:
    return build_results(
        TASKS[task],
        metrics,
        original=10,
        effective=3,
        config=run_config(model="m", model_args={}, batch_size=4, device="cpu", limit=3, bootstrap_iters=100),
        qmamba={"backend": "cpu"},
        **options,
    )


def test_last_word_metrics() -> None:
    metrics = last_word_metrics(scores(-1.0, -2.0, -3.0), bootstrap_iters=100)
    assert metrics["perplexity,none"] == pytest.approx(math.exp(2))
    assert metrics["acc,none"] == 2 / 3
    assert metrics["acc_stderr,none"] == pytest.approx(1 / 3)
    assert isinstance(metrics["perplexity_stderr,none"], float)


def test_missing_standard_errors_are_lm_evals_word() -> None:
    single = last_word_metrics(scores(-1.0))
    without = last_word_metrics(scores(-1.0, -2.0), bootstrap_iters=0)
    for metrics in (single, without):
        assert metrics["acc_stderr,none"] == metrics["perplexity_stderr,none"] == "N/A"


def test_the_layout() -> None:
    results = results_of(last_word_metrics(scores(-1.0, -2.0, -3.0), bootstrap_iters=100))
    assert results["n-samples"] == {"lastword": {"original": 10, "effective": 3}}
    assert results["higher_is_better"] == {"lastword": {"perplexity": False, "acc": True}}
    assert results["group_subtasks"] == {}
    assert results["n-shot"] == {"lastword": 0}
    assert results["qmamba"] == {"backend": "cpu"}
    assert results["config"]["limit"] == 3
    assert results["configs"]["lastword"]["dataset_path"] == "lastword.jsonl"
    assert strict(to_json(results)) == json.loads(json.dumps(results))


def test_a_file_in_place_of_the_tasks_texts_is_recorded() -> None:
    config = results_of({}, "lambada_openai", dataset="mine.jsonl")["configs"]["lambada_openai"]
    assert config["dataset_path"] == "mine.jsonl"
    assert config["dataset_name"] is None
    assert results_of({}, "lambada_openai")["configs"]["lambada_openai"]["dataset_name"] == "default"


def test_perplexity_metrics_name_a_baseline_only_where_there_was_one() -> None:
    nll = np.full((2, 3), math.log(4))
    alone = perplexity_metrics(PerplexityScore(nll=nll, correct=np.ones((2, 3), dtype=np.bool_)))
    assert alone == {
        "perplexity,none": pytest.approx(4.0),
        "bits_per_token,none": pytest.approx(2.0),
        "top1_acc,none": 1.0,
        "tokens": 6,
    }
    compared = perplexity_metrics(
        PerplexityScore(
            nll=nll,
            correct=np.ones((2, 3), dtype=np.bool_),
            kl=np.full((2, 3), 0.5),
            agrees=np.zeros((2, 3), dtype=np.bool_),
        )
    )
    assert compared["kl,none"] == 0.5
    assert compared["same_top1,none"] == 0.0
    assert set(results_of(alone, "perplexity")["higher_is_better"]["perplexity"]) == {
        "perplexity",
        "bits_per_token",
        "top1_acc",
    }
    assert "kl" in results_of(compared, "perplexity")["higher_is_better"]["perplexity"]


def test_infinities_are_strings_that_float_reads() -> None:
    metrics = last_word_metrics(scores(-1e6, -2e6), bootstrap_iters=10)
    read = strict(to_json(results_of(metrics)))["results"]["lastword"]
    assert float(read["perplexity,none"]) == math.inf
    assert float(read["perplexity_stderr,none"]) == math.inf


def test_sample_lines() -> None:
    lines = list(sample_lines(scores(-1.5, -math.inf)))
    assert lines[0] == '{"doc_id": 0, "target": " é", "ll": -1.5, "greedy": true}\n'
    assert strict(lines[1]) == {"doc_id": 1, "target": " é", "ll": "-inf", "greedy": False}
