"""The built-in scorer against lm-eval 0.4.13 itself, digit for digit, on a small random model."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qmamba_cli.evaluation.documents import read_text_documents
from qmamba_cli.evaluation.results import build_results, last_word_metrics, run_config
from qmamba_cli.evaluation.scoring import LastWordScore, score_last_word
from qmamba_cli.evaluation.tasks import TASKS
from qmamba_cli.resources import demo_model_path
from qmamba_cli.tokenizer import TOKENIZER_FILES, Tokenizer

BOOTSTRAP_ITERS = 2000
BATCH_SIZE = 4
MAX_LENGTH = 48

DOCUMENTS = [
    'The captain looked at the lantern. "Bring it here," he said, and the boy brought the lantern',
    '"You will find Margaret in the orchard," said the old man. He was right; under the trees stood Margaret',
    "word",
    "Ünïcödé — the naïve café owner said: “déjà vu”",
    "Snow ❄ fell on 東京 and the traveller whispered 東京",
    "trailing space at the end ",
    "two trailing spaces  ",
    "a newline before the last\n\n word",
    "context that ends with a tab\t word",
    "double  spaces  inside  the  line",
    "a last word with a line\nbreak",
    "it ended with an unpronounceable antidisestablishmentarianism",
    "a very long last piece: supercalifragilisticexpialidocious-pneumonoultramicroscopic",
    "he said no.",
    'he said "no."',
    "numbers 12 345 6789 1234567890",
    "<|endoftext|>The text begins with a special token",
    "a special token inside <|endoftext|> the text",
    "the last word is a special <|endoftext|>",
    "\n\nleading blank lines then words",
    " leading space then words",
    "",
    "x y",
    "a b",
    "the same document twice, the very same",
    "the same document twice, the very same",
    "the same document twice, the very different",
    *(
        f"Chapter {number}. "
        + "The river ran past the mill and the miller slept. " * repeats
        + "He was the miller"
        for number, repeats in enumerate((1, 2, 3, 4, 5, 9, 12))
    ),
]


@dataclass
class SameLogits:
    """The transformers model as a `LanguageModel` whose head has already run, so that the logits are the same
    numbers that lm-eval sees."""

    model: Any
    vocab_size: int

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@dataclass
class SeparateHead:
    """The transformers model with the head applied to the scored rows only."""

    model: Any
    vocab_size: int

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.backbone(ids).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).float()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    folder = demo_model_path()
    return Tokenizer.from_files(
        {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
    )


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(1)
    config = MambaConfig(
        vocab_size=8192 + 8, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.4
    )
    return MambaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def documents(model: Any, tokenizer: Tokenizer) -> list[str]:
    """The documents above, and some that end as the model would have it, so that the accuracy is not 0."""
    guessed = []
    for number in range(40):
        context = f"{number} men went to sea"
        ids = torch.tensor([tokenizer.encode(context)])
        word = tokenizer.decode([int(model(ids).logits[0, -1, : tokenizer.vocab_size].argmax())])
        if word.startswith(" ") and word.count(" ") == 1:
            guessed.append(context + word)
    assert guessed
    return [*DOCUMENTS, *guessed]


@pytest.fixture(scope="module")
def data_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm_eval") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def theirs(model: Any, data_file: Path) -> dict[str, Any]:
    """lm-eval's results, samples included."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    # Every process of lm-eval's bootstrap pool would import torch again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        results = lm_eval.simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=AutoTokenizer.from_pretrained(demo_model_path()),
                batch_size=BATCH_SIZE,
                max_length=MAX_LENGTH,
                device="cpu",
            ),
            tasks=[
                {
                    "task": "lambada_local",
                    "dataset_path": "json",
                    "dataset_kwargs": {
                        "data_files": {"test": str(data_file)},
                        "cache_dir": str(data_file.parent / "cache"),
                    },
                    "output_type": "loglikelihood",
                    "test_split": "test",
                    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
                    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
                    "metric_list": [
                        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                    ],
                    "metadata": {"version": 1.0},
                }
            ],
            # Without the index of lm-eval's own tasks, which takes seconds to build.
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=True,
        )
    assert results is not None
    return results


@pytest.fixture(scope="module")
def ours(model: Any, tokenizer: Tokenizer, data_file: Path) -> list[LastWordScore]:
    return score_last_word(
        SameLogits(model, model.config.vocab_size),
        tokenizer,
        read_text_documents(data_file),
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
    )


def test_every_document_equals_lm_eval(theirs: dict[str, Any], ours: list[LastWordScore]) -> None:
    samples = sorted(theirs["samples"]["lambada_local"], key=lambda sample: sample["doc_id"])
    expected = [
        (sample["doc_id"], sample["target"], *sample["filtered_resps"][0], bool(sample["acc"]))
        for sample in samples
    ]
    got = [(score.doc_id, score.target, score.ll, score.greedy, score.greedy) for score in ours]
    assert got == expected
    assert any(score.tokens > 1 for score in ours)


def test_metrics_equal_lm_eval(theirs: dict[str, Any], ours: list[LastWordScore]) -> None:
    expected = theirs["results"]["lambada_local"]
    metrics = last_word_metrics(ours, bootstrap_iters=BOOTSTRAP_ITERS)
    assert metrics == {key: expected[key] for key in metrics}
    assert 0 < metrics["perplexity,none"] < math.inf
    assert 0 < metrics["acc,none"] < 1


def test_layout_has_lm_evals_keys(theirs: dict[str, Any], ours: list[LastWordScore]) -> None:
    from lm_eval.utils import make_table

    results = build_results(
        TASKS["lambada_openai"],
        last_word_metrics(ours, bootstrap_iters=BOOTSTRAP_ITERS),
        original=len(ours),
        effective=len(ours),
        config=run_config(
            model="demo",
            model_args={},
            batch_size=BATCH_SIZE,
            device="cpu",
            limit=None,
            bootstrap_iters=BOOTSTRAP_ITERS,
        ),
        qmamba={},
    )
    own, foreign = results["results"]["lambada_openai"], theirs["results"]["lambada_local"]
    assert list(own) == list(foreign)
    for block in ("n-samples", "n-shot", "versions", "higher_is_better"):
        assert results[block]["lambada_openai"] == theirs[block]["lambada_local"], block
    assert set(results) - {"qmamba"} <= set(theirs)
    assert set(results["config"]) <= set(theirs["config"])
    # lm-eval leaves out what is None; the local copy of the task names no configuration of its dataset.
    assert set(results["configs"]["lambada_openai"]) - {"dataset_name"} <= set(
        theirs["configs"]["lambada_local"]
    )
    assert "|lambada_openai|" in make_table(results).replace(" ", "")


def test_a_head_over_the_scored_rows_only_agrees(
    model: Any, tokenizer: Tokenizer, documents: list[str], ours: list[LastWordScore]
) -> None:
    separate = score_last_word(
        SeparateHead(model, model.config.vocab_size),
        tokenizer,
        documents,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
    )
    assert [score.greedy for score in separate] == [score.greedy for score in ours]
    assert [score.ll for score in separate] == pytest.approx([score.ll for score in ours], rel=1e-5)
