"""Comparisons of planted scores: what is the same, what differs, and what the sentences say."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qmamba_cli.evaluation.batches import window_batches
from qmamba_cli.evaluation.compare import chart_data, compare_scores
from qmamba_cli.evaluation.paired import McNemar
from qmamba_cli.evaluation.score_table import ScoreTable
from qmamba_cli.evaluation.scoring import score_batch
from qmamba_cli.evaluation.verdicts import Difference, Units, verdict


def table(lls: np.ndarray, tokens: int, **columns: Any) -> ScoreTable:
    """Rows of token log-likelihoods, ``tokens`` of them a document."""
    lls = np.asarray(lls, dtype=np.float32)
    documents = lls.shape[1] // tokens
    return ScoreTable(
        documents=np.arange(documents),
        tokens=np.full(documents, tokens),
        ll=lls,
        correct=columns.pop("correct", np.zeros(lls.shape, dtype=np.bool_)),
        document_ll=lls.reshape(len(lls), documents, tokens).sum(axis=-1),
        **columns,
    )


def pair_of(found: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    (pair,) = [pair for pair in found["pairs"] if (pair["a"], pair["b"]) == (a, b)]
    return dict(pair)


@pytest.fixture
def planted(rng: np.random.Generator) -> dict[str, Any]:
    """fp; a, which loses 0.05 nats a token; its twin; b, which loses 0.02. 40 windows of 32 tokens."""
    base = rng.normal(-3, 1, 40 * 32)
    noise = rng.normal(0, 0.05, (2, base.size))
    rows = np.stack([base, base - 0.05 + noise[0], base - 0.05 + noise[0], base - 0.02 + noise[1]])
    kl = np.abs(rng.normal(0, 1, (1, base.size))) * np.array([[0], [0.05], [0.05], [0.02]])
    correct = np.tile(rng.random(base.size) < 0.4, (4, 1))
    scores = table(rows, 32, correct=correct, kl=kl, agrees=kl < 0.1)
    return compare_scores(["fp", "a", "twin", "b"], scores, last_word=False, reference="fp")


def test_metrics_of_a_mode(planted: dict[str, Any]) -> None:
    metrics = planted["modes"]["a"]
    assert metrics["tokens"] == 1280
    assert metrics["perplexity"] == pytest.approx(math.exp(-metrics["ll_per_token"]))
    assert metrics["bits_per_token"] == pytest.approx(-metrics["ll_per_token"] / math.log(2))
    assert metrics["delta_ll"] == pytest.approx(-0.05, abs=0.005)
    low, high = metrics["delta_ll_ci"]
    assert low < metrics["delta_ll"] < high < 0
    low, high = metrics["kl_ci"]
    assert 0 < low < metrics["kl_mean"] < high
    assert metrics["kl_median"] < metrics["kl_mean"] < metrics["kl_p99"] < metrics["kl_max"]
    assert 0.9 < metrics["same_top1"] < 1
    assert "delta_ll" not in planted["modes"]["fp"]


def test_the_same_bits_are_the_same_and_are_not_tested(planted: dict[str, Any]) -> None:
    twins = pair_of(planted, "a", "twin")
    assert twins["identical"] is True
    assert twins["mcnemar_p"] is None and twins["delta_ll_ci"] is None and twins["delta_ll"] == 0
    assert twins["verdict"].startswith("a and twin are identical: the same bits")
    assert [pair["identical"] for pair in planted["pairs"]] == [False, False, False, True, False, False]
    # fp, a and b: the twin adds no test to correct for.
    assert planted["statistics"]["tests"] == 3
    first, second = pair_of(planted, "a", "b"), pair_of(planted, "twin", "b")
    assert {**first, "a": "", "verdict": ""} == {**second, "a": "", "verdict": ""}
    assert planted["modes"]["a"] == planted["modes"]["twin"]


def test_one_bit_is_enough_to_differ(rng: np.random.Generator) -> None:
    rows = np.tile(rng.normal(-3, 1, 64).astype(np.float32), (2, 1))
    rows[1, 7] = np.nextafter(rows[1, 7], np.float32(0))
    found = compare_scores(["a", "b"], table(rows, 8), last_word=False)
    assert found["pairs"][0]["identical"] is False


def test_a_planted_loss_is_found_with_its_sign_and_size(planted: dict[str, Any]) -> None:
    pair = pair_of(planted, "a", "b")
    assert pair["delta_ll"] == pytest.approx(-0.03, abs=0.006)
    low, high = pair["delta_ll_ci"]
    assert low < -0.03 < high < 0
    assert pair["delta_kl"] > 0 and pair["delta_kl_ci"][0] > 0
    assert pair["verdict"].startswith("b loses 0.0")
    assert "nats a token less than a (95 % interval 0.0" in pair["verdict"]
    assert "n = 1 280 tokens in 40 windows" in pair["verdict"]
    assert "KL to fp is 0.02" in pair["verdict"] and "lower in b" in pair["verdict"]
    assert pair["verdict"].endswith("every token is right in both or in neither")
    assert pair_of(planted, "fp", "b")["verdict"].startswith("b loses 0.01")
    assert "against fp" in pair_of(planted, "fp", "b")["verdict"]


def test_a_document_is_right_when_all_its_tokens_are() -> None:
    correct = np.array([[True, True, True, False], [True, False, True, True]])
    found = compare_scores(
        ["a", "b"], table(np.full((2, 4), -1.0), 2, correct=correct), last_word=True, reference=None
    )
    assert found["modes"]["a"]["acc"] == found["modes"]["b"]["acc"] == 0.5
    assert (found["pairs"][0]["only_a"], found["pairs"][0]["only_b"]) == (1, 1)
    assert found["modes"]["a"]["perplexity"] == pytest.approx(math.exp(2))
    assert "kl_mean" not in found["modes"]["a"]


def test_the_order_of_batches_does_not_matter(rng: np.random.Generator) -> None:
    lls = rng.normal(-2, 1, (2, 6)).astype(np.float32)

    def part(documents: list[int], tokens: list[int], columns: list[int]) -> ScoreTable:
        starts = np.cumsum(tokens) - tokens
        return ScoreTable(
            documents=np.array(documents),
            tokens=np.array(tokens),
            ll=lls[:, columns],
            correct=lls[:, columns] > -2,
            document_ll=np.add.reduceat(lls[:, columns], starts, axis=1),
        )

    # Document 0 has columns 0 and 1, document 1 column 2, document 2 columns 3 to 5.
    joined = ScoreTable.joined([part([2, 0], [3, 2], [3, 4, 5, 0, 1]), part([1], [1], [2])])
    assert joined.documents.tolist() == [0, 1, 2]
    assert joined.tokens.tolist() == [2, 1, 3]
    assert np.array_equal(joined.ll, lls)
    again = ScoreTable.from_arrays(joined.arrays())
    assert again.identical(0, 0) and not again.identical(0, 1)


def test_models_beside_a_model_do_not_change_its_scores() -> None:
    class Table:
        vocab_size = 5

        def __init__(self, seed: int) -> None:
            self.rows = torch.randn((5, 5), generator=torch.Generator().manual_seed(seed))

        def hidden(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(ids, 5).float()

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.rows

    windows = torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(0))
    (batch,) = window_batches(windows, batch_size=3)
    models = [Table(1), Table(2), Table(1)]
    read = []
    together = score_batch(models, batch, reference=0, on_model=lambda: read.append(1))
    assert len(read) == 3
    for model, scores in zip(models, together, strict=True):
        (alone,) = score_batch([model], batch)
        assert torch.equal(alone.ll, scores.ll) and torch.equal(alone.correct, scores.correct)
    scores = ScoreTable.of_batch(batch, together)
    assert scores.identical(0, 2) and not scores.identical(0, 1)
    assert scores.kl is not None and (scores.kl[0] == 0).all() and scores.kl[1].mean() > 0


UNITS = Units(documents=32, tokens=16352, document="window", answer="document", reference="fp")


def difference(**changes: Any) -> Difference:
    values: dict[str, Any] = {
        "accuracy": McNemar(only_a=12, only_b=9, p=0.6636),
        "accuracy_p_corrected": 1.0,
        "ll": 0.006,
        "ll_interval": (0.004, 0.008),
        "ll_p": 0.0002,
        "ll_p_corrected": 0.002,
        "tests": 10,
    }
    return Difference(**(values | changes))


def test_the_sentence_to_quote() -> None:
    assert verdict("2-4", "0", difference(), UNITS) == (
        "2-4 loses 0.0060 nats a token less than 0 (95 % interval 0.0040 to 0.0080, n = 16 352 tokens in "
        "32 windows); accuracy does not separate them: 12 against 9 discordant documents, p = 0.66"
    )
    # The same finding, asked the other way round.
    assert verdict("0", "2-4", difference().swapped(), UNITS) == verdict("2-4", "0", difference(), UNITS)


def test_who_is_ahead_of_the_float_model_loses_nothing_either(rng: np.random.Generator) -> None:
    text = verdict("2-4", "0", difference(), replace(UNITS, above=frozenset({"2-4"})))
    assert text.startswith("2-4 is 0.0060 nats a token ahead of 0 (95 % interval 0.0040 to 0.0080, n = ")
    base = rng.normal(-4, 1, 40 * 32)
    lls = np.stack([base, base + 0.05 + rng.normal(0, 0.1, base.size), base - 0.05])
    found = compare_scores(["fp", "a", "b"], table(lls, 32), last_word=False, reference="fp")
    assert pair_of(found, "a", "b")["verdict"].startswith("a is 0.10")
    assert "nats a token ahead of b" in pair_of(found, "a", "b")["verdict"]


def test_the_float_model_loses_nothing() -> None:
    text = verdict("fp", "0", difference(), UNITS)
    assert text.startswith("0 loses 0.0060 nats a token against fp (95 % interval 0.0040 to 0.0080")
    # Named first, its own answers come first.
    assert "9 against 12 discordant documents" in text
    assert verdict("0", "fp", difference(), UNITS).startswith("0 gains 0.0060 nats a token on fp")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"ll_interval": (-0.001, 0.013), "ll_p": 0.1, "ll_p_corrected": 1.0},
            "the log-likelihood does not separate a from b: a is 0.006 nats a token ahead (95 % interval "
            "-0.001 to 0.013",
        ),
        (
            {"ll_p": 0.02, "ll_p_corrected": 0.2},
            "does not separate a from b once corrected for 10 pairs: a is 0.0060 nats a token ahead",
        ),
        ({"ll_p": 0.06, "ll_p_corrected": 0.06}, "32 windows cannot separate a from b"),
        (
            {"accuracy": McNemar(only_a=30, only_b=9, p=0.001), "accuracy_p_corrected": 0.01},
            "accuracy is higher in a: 30 against 9 discordant documents, p = 0.001",
        ),
        (
            {"accuracy": McNemar(only_a=20, only_b=9, p=0.04), "accuracy_p_corrected": 0.4},
            "accuracy does not separate them once corrected for 10 pairs: 20 against 9 discordant documents, "
            "p = 0.04, corrected = 0.4",
        ),
        (
            {"kl": -0.002, "kl_interval": (-0.003, -0.001), "kl_p": 0.0002, "kl_p_corrected": 0.001},
            "KL to fp is 0.0020 lower in a (95 % interval 0.0010 to 0.0030)",
        ),
        (
            {"kl": 0.002, "kl_interval": (-0.001, 0.005), "kl_p": 0.2, "kl_p_corrected": 1.0},
            "KL to fp does not separate them: 0.0020 lower in b",
        ),
        ({"ll": math.nan}, "a and b cannot be compared: a log-likelihood is not finite"),
        ({"ll_interval": (math.nan, math.nan), "ll_p": math.nan, "ll_p_corrected": math.nan}, "no interval"),
    ],
)
def test_other_sentences(changes: dict[str, Any], part: str) -> None:
    assert part in verdict("a", "b", difference(**changes), UNITS)


def test_a_broken_model_has_a_row_and_no_interval(rng: np.random.Generator) -> None:
    rows = rng.normal(-3, 1, (2, 64))
    rows[1, 5] = -math.inf
    found = compare_scores(["a", "b"], table(rows, 8), last_word=True)
    assert found["modes"]["b"]["perplexity"] == math.inf
    pair = found["pairs"][0]
    assert pair["delta_ll_ci"] is None and pair["delta_ll"] == math.inf
    assert "not finite" in pair["verdict"]


def test_every_token_is_in_the_histogram() -> None:
    kl = np.array([[0.0, 0.0, 0.0, 0.0], [1e-9, 1e-3, 0.5, math.nan]])
    data = chart_data(["fp", "a"], table(np.full((2, 4), -1.0), 2, kl=kl, agrees=kl < 1), bins=10)
    assert data["kl_edges"][0] == 1e-6 and data["kl_edges"][-1] == pytest.approx(0.5)
    assert data["kl_counts"]["fp"] == [4, *[0] * 9]
    assert data["kl_counts"]["a"][0] == 2 and data["kl_counts"]["a"][-1] == 1
    assert sum(data["kl_counts"]["a"]) == 4
    assert chart_data(["a"], table(np.full((1, 2), -1.0), 2)) == {}
