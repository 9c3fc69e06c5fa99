"""Known answers on models that are tables of logits, and what scoring asks of a model."""

import math
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers, processors

from qmamba_cli.errors import CheckpointError, DatasetError, ShapeError, UsageError
from qmamba_cli.evaluation import scoring
from qmamba_cli.evaluation.scoring import PerplexityScore, score_last_word, score_perplexity
from qmamba_cli.tokenizer import Tokenizer

# Probability of the next token (column) after a token (row); dyadic, so that the answers are short.
TABLE = [
    [0.5, 0.25, 0.125, 0.125],
    [0.25, 0.25, 0.25, 0.25],
    [0.125, 0.125, 0.5, 0.25],
    [0.125, 0.5, 0.25, 0.125],
]
UNIFORM = [[0.25] * 4] * 4


class TableModel:
    """A bigram model: the hidden state is the token itself, the head looks up its row."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.table = torch.tensor(probabilities).log()
        self.vocab_size = self.table.shape[1]
        self.inputs: list[list[list[int]]] = []
        self.head_rows: list[int] = []

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        self.inputs.append(ids.tolist())
        return torch.nn.functional.one_hot(ids, len(self.table)).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.head_rows.append(hidden.shape[0])
        # A constant per row changes no probability.
        return self.table[hidden.argmax(dim=-1)] + 3.0


WORDS = ("end", " a", " b", " c")


def word_tokenizer(*, bos: int | None = 0, template: bool = False) -> Tokenizer:
    """Ids 0 to 3 for `end`, ` a`, ` b` and ` c`; a text without its leading space loses a token."""
    vocab = {word.replace(" ", "Ġ"): number for number, word in enumerate(WORDS)}
    backend = BackendTokenizer(models.WordLevel(vocab, unk_token="end"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if template:
        backend.post_processor = processors.TemplateProcessing(single="end $A", special_tokens=[("end", 0)])
    return Tokenizer(backend, bos_id=bos)


def test_last_word_known_answers() -> None:
    model = TableModel(TABLE)
    # " a b" → ids 1 2, " c c b" → 3 3 2, and one word alone behind bos: 0 1.
    scores = score_last_word(model, word_tokenizer(), [" a b", " c c b", "a"], batch_size=8)
    assert [score.doc_id for score in scores] == [0, 1, 2]
    assert [score.target for score in scores] == [" b", " b", " a"]
    assert [score.ll for score in scores] == pytest.approx([math.log(0.25)] * 3)
    # After 1 all are equal and the first counts, after 3 token 1 leads, after 0 token 0.
    assert [score.greedy for score in scores] == [False, False, False]
    assert [score.tokens for score in scores] == [1, 1, 1]
    best = score_last_word(model, word_tokenizer(), [" b b", " a c a"], batch_size=1)
    assert [score.ll for score in best] == pytest.approx([math.log(0.5)] * 2)
    assert [score.greedy for score in best] == [True, True]


def test_longest_documents_come_first_padded_on_the_right() -> None:
    model = TableModel(TABLE)
    documents = [" a b", " c c b a", " b c", " a b c", " b b"]
    score_last_word(model, word_tokenizer(), documents, batch_size=2)
    # The last token is a target only; equal lengths go by ids.
    assert model.inputs == [[[3, 3, 2], [1, 2, 0]], [[1], [2]]]


def test_documents_that_share_an_input_run_once() -> None:
    model = TableModel(TABLE)
    scores = score_last_word(model, word_tokenizer(), [" a b", " a c", " a b"], batch_size=2)
    assert model.inputs == [[[1]]]
    assert [score.target for score in scores] == [" b", " c", " b"]
    assert scores[0].ll == scores[2].ll


def test_the_batch_size_changes_no_answer() -> None:
    documents = [" a b", " c c b a", " b c", "a", " a b c", " b b"]
    one, all_at_once = (
        score_last_word(TableModel(TABLE), word_tokenizer(), documents, batch_size=size) for size in (1, 6)
    )
    assert one == all_at_once


def test_a_long_context_loses_its_beginning() -> None:
    model = TableModel(TABLE)
    score_last_word(model, word_tokenizer(), [" a b c a b"], batch_size=1, max_length=3)
    assert model.inputs == [[[2, 3, 1]]]


def test_default_special_tokens_are_added_but_not_twice() -> None:
    model = TableModel(TABLE)
    score_last_word(model, word_tokenizer(template=True), [" a b"], batch_size=1)
    score_last_word(model, word_tokenizer(template=True), ["end a b"], batch_size=1)
    score_last_word(model, word_tokenizer(template=True), ["b"], batch_size=1)
    assert model.inputs == [[[0, 1]], [[0, 1]], [[0]]]


def test_only_scored_rows_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TableModel(TABLE)
    score_last_word(model, word_tokenizer(), [" a b c a b", " c a b"], batch_size=2)
    assert model.head_rows == [2]
    monkeypatch.setattr(scoring, "_LOGITS_BLOCK", 3 * model.vocab_size)
    model.head_rows.clear()
    score_perplexity(model, torch.zeros((2, 5), dtype=torch.int64), batch_size=2)
    assert model.head_rows == [3, 3, 2]


def test_progress_counts_documents() -> None:
    counted: list[int] = []
    opened: list[int] = []

    @contextmanager
    def progress(description: str, total: int):  # type: ignore[no-untyped-def]
        opened.append(total)
        advance: Callable[[int], None] = counted.append
        yield advance

    score_last_word(
        TableModel(TABLE), word_tokenizer(), [" a b", " a b", " b c"], batch_size=1, progress=progress
    )
    score_perplexity(
        TableModel(TABLE), torch.zeros((5, 2), dtype=torch.int64), batch_size=2, progress=progress
    )
    assert opened == [3, 5]
    assert counted == [2, 1, 2, 2, 1]


def test_unusable_documents_are_explained() -> None:
    model = TableModel(TABLE)
    with pytest.raises(DatasetError, match="got no documents"):
        score_last_word(model, word_tokenizer(), [], batch_size=1)
    with pytest.raises(DatasetError, match="document 1: last word has 3 tokens, expected 1 to 2"):
        score_last_word(model, word_tokenizer(), [" a b", " a end!end"], batch_size=1, max_length=2)
    # The word alone is the token that already stands for the empty context, so that nothing is left to score.
    with pytest.raises(DatasetError, match="document 0: last word has 0 tokens, expected 1 to 2048"):
        score_last_word(model, word_tokenizer(), ["unknown"], batch_size=1)
    with pytest.raises(CheckpointError, match="neither bos nor eos"):
        score_last_word(model, word_tokenizer(bos=None), ["a"], batch_size=1)
    with pytest.raises(UsageError, match="`--batch-size`: got 0"):
        score_last_word(model, word_tokenizer(), [" a b"], batch_size=0)


def test_a_foreign_tokenizer_is_noticed() -> None:
    model = TableModel([row[:3] for row in TABLE[:3]])
    with pytest.raises(
        CheckpointError, match="got token id 3, expected ids below the model's vocabulary of 3"
    ):
        score_last_word(model, word_tokenizer(), [" a c"], batch_size=1)
    with pytest.raises(CheckpointError, match="got token id 3"):
        score_perplexity(model, torch.tensor([[0, 3]]), batch_size=1)


def test_perplexity_known_answers() -> None:
    windows = torch.tensor([[0, 0, 1], [2, 3, 1]])
    score = score_perplexity(TableModel(TABLE), windows, batch_size=1)
    assert score.nll / math.log(2) == pytest.approx(np.array([[1, 2], [2, 1]]))
    assert score.tokens == 4
    assert score.bits_per_token == pytest.approx(1.5)
    assert score.perplexity == pytest.approx(2**1.5)
    assert score.correct.tolist() == [[True, False], [False, True]]
    assert score.top1_acc == 0.5
    assert score.kl_mean is None
    assert score.same_top1 is None


def test_kl_known_answers() -> None:
    windows = torch.tensor([[0, 1, 2], [3, 0, 0]])
    # Positions hold 0, 1 and 3, 0; KL(row ‖ uniform) = 2 bits - entropy(row), which is 1.75, 2, 1.75, 1.75.
    score = score_perplexity(TableModel(UNIFORM), windows, baseline=TableModel(TABLE), batch_size=2)
    assert score.kl is not None
    assert score.kl / math.log(2) == pytest.approx(np.array([[0.25, 0.0], [0.25, 0.25]]), abs=1e-6)
    assert score.kl_mean == pytest.approx(0.1875 * math.log(2), abs=1e-7)
    # Uniform logits have token 0 first: so has the row of 0 and of 1, but not that of 3.
    assert score.same_top1 == 0.75
    assert score.perplexity == pytest.approx(4.0)
    # The divergence is not symmetric: KL(uniform ‖ row of 0) = (1 + 2 + 3 + 3) / 4 - 2 bits.
    swapped = score_perplexity(TableModel(TABLE), windows[:1, :2], baseline=TableModel(UNIFORM), batch_size=2)
    assert swapped.kl_mean == pytest.approx(0.25 * math.log(2), abs=1e-7)


def test_a_model_does_not_diverge_from_itself() -> None:
    windows = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]])
    score = score_perplexity(TableModel(TABLE), windows, baseline=TableModel(TABLE), batch_size=2)
    assert score.kl_mean == 0.0
    assert score.same_top1 == 1.0


def test_blocks_and_batches_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]])

    def score(batch_size: int) -> PerplexityScore:
        return score_perplexity(
            TableModel(TABLE), windows, baseline=TableModel(UNIFORM), batch_size=batch_size
        )

    whole = score(3)
    monkeypatch.setattr(scoring, "_LOGITS_BLOCK", 8)
    for batch_size in (1, 2, 3):
        pieces = score(batch_size)
        assert np.array_equal(pieces.nll, whole.nll)
        assert pieces.kl is not None and whole.kl is not None
        assert np.array_equal(pieces.kl, whole.kl)
        assert np.array_equal(pieces.correct, whole.correct)


def test_a_broken_model_is_infinitely_perplexed() -> None:
    model = TableModel(TABLE)
    model.table = torch.full((4, 4), -1e6)
    model.table[:, 0] = 1e6
    score = score_perplexity(model, torch.tensor([[0, 1, 2]]), batch_size=1)
    assert score.perplexity == math.inf
    assert math.isfinite(score.bits_per_token)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (4,)])
def test_windows_must_hold_something_to_score(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="expected \\(n, seqlen\\)"):
        score_perplexity(TableModel(TABLE), torch.zeros(shape, dtype=torch.int64), batch_size=1)


def test_the_baseline_must_share_the_vocabulary() -> None:
    with pytest.raises(CheckpointError, match="baseline: got a vocabulary of 3, expected the model's 4"):
        score_perplexity(
            TableModel(TABLE),
            torch.tensor([[0, 1]]),
            baseline=TableModel([row[:3] for row in TABLE[:3]]),
            batch_size=1,
        )
